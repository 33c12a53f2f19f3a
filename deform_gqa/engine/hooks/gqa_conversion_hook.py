"""Uptraining: a multi-head checkpoint is loaded into a model with grouped queries."""

from collections.abc import Sequence
from pathlib import Path

from mmengine.dist import broadcast, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner

from deform_gqa.checks import check_bool, check_int
from deform_gqa.conversion import convert_checkpoint
from deform_gqa.engine.calibration_data import calibration_batches
from deform_gqa.engine.unwrap import unwrap_model

__all__ = ['GQAConversionHook']


@HOOKS.register_module()
class GQAConversionHook(Hook):
    """Converts the checkpoint of ``load_from`` to the kv heads of the model.

    With a config whose model has grouped queries,
    ``load_from='MULTI_HEAD.pth', custom_hooks=[dict(type='GQAConversionHook')]`` is all
    that uptraining needs. The weights change before they are loaded, so that the
    optimizer, DDP and EMA see those of the model. Checkpoints that fit as they are stay
    so, and on resume nothing is done. Keys that the model does not have, and tensors
    of another shape, are errors. The report is in the log and in the run's folder.

    Args:
        grouping: As in :func:`deform_gqa.conversion.convert_state_dict`.
        merge: As there.
        calibrate: Number of training images that the trained model is run on, for the
            options that need them and to report the errors of the outputs; 0 for none.
        refit_output: As in ``convert_state_dict``; needs ``calibrate``.
        seed: For the images' random transforms, and for ``merge='random'``.
        ignore: Regular expressions of keys that training does not start with, for
            example those of a head with another number of classes. A checkpoint that
            is only validated or tested is loaded with them.

    Raises:
        TypeError: For a number of another type.
        ValueError: For ``calibrate`` below 0; when a checkpoint is loaded, for options
            or weights that do not fit.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which copies the weights

    def __init__(
        self,
        grouping='adjacent',
        merge: str = 'mean',
        calibrate: int = 0,
        refit_output: bool = False,
        seed: int = 0,
        ignore: Sequence[str] = (),
    ):
        check_int('calibrate', calibrate, 0)
        check_bool('refit_output', refit_output)
        check_int('seed', seed, 0)
        self.calibrate = calibrate
        self.ignore = ignore
        self.options = dict(
            grouping=grouping, merge=merge, refit_output=refit_output, seed=seed
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Replaces the weights in the checkpoint, unless a run is resumed."""
        if runner._resume:
            return
        trains = isinstance(runner._train_loop, BaseLoop)  # else it is still a config
        calibration = None
        if self.calibrate:
            calibration = self._calibration(runner)
        state, report = convert_checkpoint(
            checkpoint,
            unwrap_model(runner.model),
            source=str(runner._load_from),
            ignore=self.ignore if trains else (),
            calibration=calibration,
            **self.options,
        )
        if self.calibrate and report.converted:
            for value in state.values():  # sums differ in their last bits
                broadcast(value)
        checkpoint['state_dict'] = state
        if report.converted:
            runner.logger.info(f'Heads were merged:\n{report}')
            if is_main_process():
                report.write(Path(runner.log_dir, 'head_conversion'))

    def _calibration(self, runner: Runner):
        """Runs a model on training images; made only if it is called."""

        def run(model) -> None:
            dataset = runner.train_dataloader.dataset
            for batch in calibration_batches(
                dataset, self.calibrate, self.options['seed']
            ):
                model.test_step(batch)

        return run
