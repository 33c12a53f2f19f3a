"""Pictures of what a detector attends to, while it is validated or tested."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import mmcv
from mmdet.structures import DetDataSample
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from deform_gqa.checks import check_int
from deform_gqa.visualization import (
    draw_detections,
    figure_to_image,
    record_attention,
)


@HOOKS.register_module()
class AttentionVisualizationHook(Hook):
    """Draws the sampled points and attention weights of some images.

    The pictures go to the runner's visualizer, and so to whatever backends the config
    gives it: files in ``vis_data``, TensorBoard and others. There is one for each image
    and module, named ``attention/IMAGE/MODULE``; its step is the epoch, or 0 in tests.

    Args:
        num_images: Number of images, the first ones of the data set.
        interval: Validations from one drawn to the next.
        modules: Regular expression that is searched for in the names of modules; see
            :func:`deform_gqa.visualization.record_attention` for what can be drawn.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is less than 1; or, as validation starts, if no module
            has such a name.
    """

    priority = 'NORMAL'

    def __init__(self, num_images: int = 2, interval: int = 1, modules: str = ''):
        check_int('num_images', num_images, 1)
        check_int('interval', interval, 1)
        self.num_images, self.interval, self.modules = num_images, interval, modules
        self._validations = 0
        self._drawn = 0
        self._recording = contextlib.ExitStack()
        self._records = {}

    def before_val(self, runner: Runner) -> None:
        self._drawn = 0

    def after_val(self, runner: Runner) -> None:
        self._validations += 1

    def before_test(self, runner: Runner) -> None:
        self._drawn = 0

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        if self._validations % self.interval == 0:
            self._start(runner)

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch=None,
        outputs: Sequence[DetDataSample] | None = None,
    ) -> None:
        self._draw(runner, outputs, runner.epoch)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self._start(runner)

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch=None,
        outputs: Sequence[DetDataSample] | None = None,
    ) -> None:
        self._draw(runner, outputs, 0)

    def _start(self, runner: Runner) -> None:
        if self._drawn >= self.num_images:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._records = self._recording.enter_context(
            record_attention(model, self.modules)
        )

    def _draw(
        self, runner: Runner, outputs: Sequence[DetDataSample], step: int
    ) -> None:
        self._recording.close()
        records, self._records = self._records, {}
        if not records:
            return
        for index, result in enumerate(outputs[: self.num_images - self._drawn]):
            data = get(result.img_path)
            image = mmcv.imfrombytes(data, channel_order='rgb')
            for name, record in records.items():
                figure = draw_detections(image, record, result, index=index)
                runner.visualizer.add_image(
                    f'attention/{Path(result.img_path).stem}/{name}',
                    figure_to_image(figure),
                    step=step,
                )
            self._drawn += 1
