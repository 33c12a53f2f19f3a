"""Stops a run that would go on with weights that it has not got."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from deform_gqa.engine.unwrap import unwrap_model

__all__ = ['WeightsCheckHook']

_EXAMPLES = 3


@HOOKS.register_module()
class WeightsCheckHook(Hook):
    """Refuses a checkpoint of which no tensor fits the model.

    mmengine logs what is missing or unexpected and goes on, if need be with random
    weights. Checkpoints that fit in part are left to it.

    Raises:
        ValueError: When a checkpoint is loaded of which nothing fits.
    """

    # After hooks that convert what is loaded.
    priority = 'LOWEST'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get('state_dict', checkpoint)
        # mmengine strips this prefix, too.
        shapes = {
            name.removeprefix('module.'): getattr(value, 'shape', None)
            for name, value in state.items()
        }
        wanted = unwrap_model(runner.model).state_dict()
        if not wanted or any(
            shapes.get(name) == value.shape for name, value in wanted.items()
        ):
            return
        raise ValueError(
            'nothing in the checkpoint fits the model: the checkpoint has '
            f'{len(shapes)} entries such as {list(shapes)[:_EXAMPLES]}, the model '
            f'{len(wanted)} such as {list(wanted)[:_EXAMPLES]}'
        )
