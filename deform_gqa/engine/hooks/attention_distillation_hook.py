"""Trains a detector to give the attention outputs of a teacher, layer by layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import CheckpointLoader, Runner
from torch import Tensor, nn

from deform_gqa.checks import check_number, describe

__all__ = ['AttentionDistillationHook', 'relative_error']

# The key that the losses of an iteration get, and the log with them.
LOSS_NAME = 'loss_attn_distill'


@HOOKS.register_module()
class AttentionDistillationHook(Hook):
    """Adds to a detector's losses how far its attention outputs are from a teacher's.

    Made for the uptraining of converted checkpoints: the multi-head detector that the
    grouped-query one was made from is the teacher. ::

        custom_hooks = [
            dict(type='GQAConversionHook'),
            dict(
                type='AttentionDistillationHook',
                teacher_config='MULTI_HEAD_CONFIG.py',
                teacher_ckpt='MULTI_HEAD.pth',
            ),
        ]

    In each training iteration the teacher sees the images that the model sees, in eval
    mode and without gradients. The loss is ``loss_weight`` times the mean over layers
    of :func:`relative_error`, and is logged as ``loss_attn_distill``. It acts through
    the model's own forward pass, so mixed precision, gradient accumulation and
    distributed wrappers treat it as any other loss; activation checkpointing must not
    be the reentrant kind, whose forward passes record no gradients.

    The teacher belongs to the hook and not to the model: neither optimizer nor
    checkpoint nor moving average knows it, and a resumed run reads it from
    ``teacher_ckpt`` again. If all ``layers`` are in ``backbone``, the rest of the
    teacher does not run.

    Args:
        teacher_config: Config of the teacher: a file, or a config with ``model``.
        teacher_ckpt: Its checkpoint.
        loss_weight: Factor of the loss, above 0.
        layers: Paths of the modules that are compared, such as
            ``'backbone.stages.3.attns.0'``, which the teacher has as well. Defaults to
            all modules of the model with an attribute ``num_kv_heads``. Of a module
            that returns a tuple the first entry is compared. A transformer decoder
            that draws its queries at random has to be left out.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For a ``loss_weight`` that is not above 0, no ``layers``, or, when
            training starts, layers that the model or the teacher does not have and a
            checkpoint that does not fit the teacher; in the first iteration for layers
            that do not run, or whose outputs differ in number or shape from the
            teacher's.
    """

    def __init__(
        self,
        teacher_config: str | Path | Mapping[str, Any],
        teacher_ckpt: str | Path,
        loss_weight: float = 1.0,
        layers: list[str] | None = None,
    ) -> None:
        if not isinstance(teacher_config, (str, Path, Mapping, Config)):
            raise TypeError(
                'teacher_config must be a file or a config, got '
                f'{describe(teacher_config)}'
            )
        if not isinstance(teacher_ckpt, (str, Path)):
            raise TypeError(
                f'teacher_ckpt must be a file, got {describe(teacher_ckpt)}'
            )
        check_number('loss_weight', loss_weight)
        if not loss_weight > 0:
            raise ValueError(f'loss_weight must be above 0, got {loss_weight}')
        if layers is not None:
            _check_layers(layers)
        self.teacher_config = teacher_config
        self.teacher_ckpt = str(teacher_ckpt)
        self.loss_weight = loss_weight
        self.layers = layers
        self._handles: list[Any] = []

    def before_train(self, runner: Runner) -> None:
        """Builds the teacher, and listens to both models.

        The moving average's copy of the model has been made by now, without listeners.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        layers = _kv_head_layers(model) if self.layers is None else self.layers
        self._actual = _OutputRecorder(model, layers, 'the model')
        teacher = _build_teacher(self.teacher_config, self.teacher_ckpt)
        self._teacher = teacher.to(next(model.parameters()).device)
        self._expected = _OutputRecorder(self._teacher, layers, 'the teacher')
        self._backbone_only = all(name.startswith('backbone.') for name in layers)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def after_train(self, runner: Runner) -> None:
        """Leaves the model as it was, and lets the teacher go."""
        for handle in self._handles:
            handle.remove()
        self._actual.close()
        del self._teacher, self._expected, self._actual

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if not _computes_losses(model, args, kwargs):
            return
        inputs = args[0] if args else kwargs['inputs']
        samples = args[1] if len(args) > 1 else kwargs.get('data_samples')
        with torch.no_grad():
            self._expected.start()
            if self._backbone_only:
                self._teacher.backbone(inputs)
            else:
                self._teacher(inputs, samples, mode='tensor')
        self._actual.start()

    def _after_forward(
        self, model: nn.Module, args: tuple, kwargs: dict, losses: Any
    ) -> Any:
        if not _computes_losses(model, args, kwargs):
            return None  # keeps the output
        actual, expected = self._actual.stop(), self._expected.stop()
        errors = [
            relative_error(ours, theirs)
            for name in actual
            for ours, theirs in _pairs(name, actual[name], expected[name])
        ]
        return {**losses, LOSS_NAME: self.loss_weight * torch.stack(errors).mean()}


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Squared distance of two tensors over the squared norm of ``expected``.

    Args:
        actual, expected: Floating-point tensors of one shape, any.

    Returns:
        A scalar in float32 whatever the autocast dtype: 0 where both are equal.
    """
    actual, expected = actual.float(), expected.float()
    norm = expected.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (actual - expected).square().mean() / norm


class _OutputRecorder:
    """Keeps what the named modules of a model return, from ``start`` to ``stop``.

    What activation checkpointing computes again in the backward pass falls outside.
    """

    def __init__(self, model: nn.Module, layers: list[str], owner: str) -> None:
        modules = dict(model.named_modules())
        missing = [name for name in layers if name not in modules]
        if missing:
            raise ValueError(f'layers: {owner} has no module {missing[0]!r}')
        self._layers = layers
        self._outputs: dict[str, list[Tensor]] | None = None
        self._handles = [
            modules[name].register_forward_hook(self._listener(name)) for name in layers
        ]

    def _listener(self, name: str):
        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            if self._outputs is not None:
                first = output[0] if isinstance(output, tuple) else output
                self._outputs[name].append(first)

        return keep

    def start(self) -> None:
        self._outputs = {name: [] for name in self._layers}

    def stop(self) -> dict[str, list[Tensor]]:
        outputs, self._outputs = self._outputs, None
        return outputs

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _check_layers(layers: Any) -> None:
    if not isinstance(layers, (list, tuple)) or not all(
        isinstance(name, str) for name in layers
    ):
        raise TypeError(f'layers must be a list of paths, got {describe(layers)}')
    if not layers:
        raise ValueError('layers must name a module, got []')


def _kv_head_layers(model: nn.Module) -> list[str]:
    layers = [
        name
        for name, module in model.named_modules()
        if hasattr(module, 'num_kv_heads')
    ]
    if not layers:
        raise ValueError(
            f'layers must be given: no module of {type(model).__name__} has an '
            'attribute num_kv_heads'
        )
    return layers


def _build_teacher(config: str | Path | Mapping[str, Any], ckpt: str) -> nn.Module:
    """In eval mode, without gradients, and without what ``init_cfg`` would load."""
    cfg = Config.fromfile(config) if isinstance(config, (str, Path)) else config
    teacher = MODELS.build(cfg['model'])
    checkpoint = CheckpointLoader.load_checkpoint(ckpt, map_location='cpu')
    try:
        teacher.load_state_dict(checkpoint.get('state_dict', checkpoint))
    except RuntimeError as error:  # torch's message names every key that differs
        raise ValueError(
            f'teacher_ckpt {ckpt!r} does not fit the model of teacher_config: {error}'
        ) from error
    return teacher.eval().requires_grad_(False)


def _computes_losses(model: nn.Module, args: tuple, kwargs: dict) -> bool:
    mode = args[2] if len(args) > 2 else kwargs.get('mode')
    return model.training and mode == 'loss'


def _pairs(
    name: str, actual: list[Tensor], expected: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The outputs of one layer, call by call."""
    shapes = [[tuple(x.shape) for x in outputs] for outputs in (actual, expected)]
    if not actual or shapes[0] != shapes[1]:
        raise ValueError(
            f'layers: the outputs of {name!r} in one forward pass must have the shapes '
            f"of the teacher's, got {shapes[0]} and {shapes[1]}"
        )
    return list(zip(actual, expected, strict=True))
