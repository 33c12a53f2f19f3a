"""Measures within a run where the time of training, validation and testing goes."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from deform_gqa.checks import check_bool, check_int
from deform_gqa.engine.checkpoint_io import AtomicLocalBackend
from deform_gqa.engine.hooks.runtime_benchmark_options import (
    check_modules,
    check_out_dir,
)
from deform_gqa.engine.unwrap import unwrap_model
from deform_gqa.profiling.clock import make_clock
from deform_gqa.profiling.environment import describe_environment
from deform_gqa.profiling.module_timing import attention_groups, select_modules
from deform_gqa.profiling.runtime_report import (
    JSON_NAME,
    MARKDOWN_NAME,
    load_runs,
    markdown,
    to_json,
)
from deform_gqa.profiling.step_timing import SampledStep, StepTimer

__all__ = ['RuntimeBenchmarkHook']

_MODES = ('train', 'val', 'test')
# What lies between two steps, besides loading data, by mode.
_AFTER_STEP = dict(train='hooks', val='evaluator', test='evaluator')
_SAVE_EVERY_S = 60.0


@HOOKS.register_module()
class RuntimeBenchmarkHook(Hook):
    """Splits the time of sampled iterations into phases, and times attention by type.

    Use::

        custom_hooks = [dict(type='RuntimeBenchmarkHook', interval=50)]

    The phases of an iteration add up to its wall-clock time, less the time that it
    takes to install and read the timers:

    - ``data``: waiting for the data loader (and other hooks' ``before_*_iter``);
    - ``preprocess``: the data preprocessor, with the copy to the device;
    - ``forward``: the call of the model, up to the losses or predictions;
    - ``backward`` and ``optimizer`` (clipping, step and zero_grad; in training);
    - ``other``: the rest of the step, such as adding up the losses;
    - ``hooks`` in training: the other hooks after the iteration; ``evaluator`` in
      validation and testing: the metrics' ``process`` and the other hooks.

    Modules are timed within forward and backward; see
    :class:`deform_gqa.profiling.module_timing.ModuleTimer`. On a CUDA device all but
    ``data``, ``hooks`` and ``evaluator`` are measured between CUDA events; the hook
    waits for the device at the beginning and at the end of a sampled iteration and at
    no other time. Between sampled iterations nothing is installed on the model or the
    optimizer. In a distributed run only the main process measures. With torch.compile,
    the timers of the first samples cause one more compilation, which shows in their
    times. If a step is compiled as a whole (``compile=True`` in the config),
    preprocessing and forward count as ``other``, and its modules have no times.

    With gradient accumulation over n iterations the interval is raised to the next
    number that has no divisor in common with n, so that each of the n is sampled.

    Each sample goes to the visualizer's backends as ``runtime/MODE/PHASE_ms`` and
    ``runtime/MODE/MODULES/forward_ms``. All samples are in ``runtime_benchmark.json``
    (milliseconds), medians and shares also in ``runtime_benchmark.md``. Both files
    are replaced in one step, at the end of an epoch and of the run, and at a sample
    if they were last written a minute ago, so that an interrupted run leaves what it
    measured.

    Args:
        interval (int): Training iterations from one sample to the next, at least 1.
        eval_interval (int): The same for validation and testing, which may have fewer
            iterations.
        warmup_iters (int): Iterations of each mode that are not sampled at the start
            of the process, also if it resumes a run; at least 0.
        modules (dict, optional): Groups of modules to time: name -> class name or
            path of a module, or a list of them; see
            :func:`deform_gqa.profiling.module_timing.select_modules`. Defaults to the
            attention modules, one group for each class.
        out_dir (str, optional): Local folder of the two files. If there is a report
            already, it keeps its runs and gets one more. Defaults to the log folder of
            the run, ``work_dir/TIMESTAMP``, which is new for every run and resumption.
        log_scalars (bool): Whether the samples go to the visualizer.

    Raises:
        TypeError, ValueError: For an option of a wrong type or value; for ``modules``
            that the model does not have, for a device that is neither CPU nor CUDA
            and for a file in ``out_dir`` that is no such report, before the run
            starts.
        OSError: If the files cannot be written, before the run starts. Later it is a
            warning.
    """

    # The last of all hooks, so that no iteration's time includes what it does.
    priority = 'LOWEST'

    def __init__(
        self,
        interval: int = 50,
        eval_interval: int = 10,
        warmup_iters: int = 10,
        modules: Mapping[str, str | Sequence[str]] | None = None,
        out_dir: str | Path | None = None,
        log_scalars: bool = True,
    ) -> None:
        check_int('interval', interval, 1)
        check_int('eval_interval', eval_interval, 1)
        check_int('warmup_iters', warmup_iters, 0)
        check_out_dir(out_dir)
        check_bool('log_scalars', log_scalars)
        self.every = dict(train=interval, val=eval_interval, test=eval_interval)
        self.warmup_iters = warmup_iters
        self.modules = None if modules is None else check_modules(modules)
        self.out_dir = out_dir
        self.log_scalars = log_scalars
        self._seen = dict.fromkeys(_MODES, 0)
        self._groups: dict[str, list[nn.Module]] = {}
        self._run: dict[str, Any] | None = None
        self._step: SampledStep | None = None

    # Before the run

    def before_run(self, runner: Runner) -> None:
        """Finds the modules and begins the record, or says what is wrong."""
        self._drop_step()  # of a run that was interrupted
        if not is_main_process():
            return
        self._groups = self._find_modules(runner.model)
        parameter = next(runner.model.parameters(), torch.empty(0))
        self._device = parameter.device
        self._clock = make_clock(self._device)
        if self._run is None:  # and not for the test after a training
            self._begin_record(runner)

    def before_train(self, runner: Runner) -> None:
        """Keeps samples from falling on the same iteration of each accumulation."""
        counts = max(
            getattr(wrapper, '_accumulative_counts', 1)
            for wrapper in _optim_wrappers(runner)
        )
        interval = self.every['train']
        while math.gcd(self.every['train'], counts) > 1:
            self.every['train'] += 1
        if self.every['train'] != interval:
            runner.logger.info(
                f'RuntimeBenchmarkHook: gradients accumulate over {counts} iterations, '
                f'interval={interval} is raised to {self.every["train"]}'
            )

    def _find_modules(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        model = unwrap_model(model)
        if self.modules is None:
            return attention_groups(model)
        groups = {}
        for name, choices in self.modules.items():
            try:
                found = [select_modules(model, choice) for choice in choices]
            except ValueError as error:
                raise ValueError(f'modules[{name!r}]: {error}') from error
            groups[name] = list(dict.fromkeys(m for part in found for m in part))
        return groups

    def _begin_record(self, runner: Runner) -> None:
        if not self._groups:
            runner.logger.warning(
                'RuntimeBenchmarkHook: the model has no attention modules; their part '
                'of the time will be missing'
            )
        folder = runner.log_dir if self.out_dir is None else self.out_dir
        self._folder = Path(folder)
        self._earlier = load_runs(self._folder / JSON_NAME)
        environment = describe_environment(self._device)
        environment |= dict(mmengine=mmengine.__version__, world_size=get_world_size())
        names = {
            module: name for name, module in unwrap_model(runner.model).named_modules()
        }
        self._run = dict(
            name=runner.experiment_name,
            started=runner.timestamp,
            environment=environment,
            every=self.every,
            warmup_iters=self.warmup_iters,
            modules={
                name: [names[module] for module in modules]
                for name, modules in self._groups.items()
            },
            samples={mode: [] for mode in _MODES},
        )
        self._write()  # so that a folder that cannot be written is found now

    # Iterations

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        if self._run is not None:
            # Another hook may have exchanged modules since the run began.
            self._groups = self._find_modules(runner.model)
            self._begin_iteration(mode)

    def after_val(self, runner: Runner) -> None:
        """An iteration of an iteration-based training follows."""
        if self._run is not None:
            self._begin_iteration('train')

    def _begin_iteration(self, mode: str) -> None:
        if self._is_due(mode):
            self._clock.synchronize()
        self._start_s = time.perf_counter()

    def _is_due(self, mode: str) -> bool:
        late = self._seen[mode] - self.warmup_iters
        return late >= 0 and late % self.every[mode] == 0

    def _before_iter(self, runner: Runner, mode: str = 'train', **_: Any) -> None:
        if self._run is None or not self._is_due(mode):
            return
        self._data_ms = _ms_since(self._start_s)
        self._drop_step()
        wrappers = _optim_wrappers(runner) if mode == 'train' else []
        timer = StepTimer(runner.model, self._device, self._groups, wrappers)
        self._step = SampledStep(runner.model, f'{mode}_step', timer)

    def _after_iter(self, runner: Runner, mode: str = 'train', **_: Any) -> None:
        if self._run is None:
            return
        self._seen[mode] += 1
        step, self._step = self._step, None
        if step is not None and step.time is not None:
            self._add_sample(runner, mode, step)
        self._begin_iteration(mode)

    def _drop_step(self) -> None:
        if self._step is not None:
            self._step.remove()
            self._step = None

    def _add_sample(self, runner: Runner, mode: str, step: SampledStep) -> None:
        phases = dict(data=self._data_ms, **step.time.parts_ms)
        if mode != 'train':
            del phases['backward'], phases['optimizer']
        phases[_AFTER_STEP[mode]] = _ms_since(step.end_s)
        sample = dict(
            iter=runner.iter + 1 if mode == 'train' else self._seen[mode],
            total_ms=sum(phases.values()),
            phases_ms=phases,
            modules={name: vars(x) for name, x in step.time.modules.items()},
        )
        self._run['samples'][mode].append(sample)
        if self.log_scalars:
            scalars = _scalars(f'runtime/{mode}', sample)
            runner.visualizer.add_scalars(scalars, step=sample['iter'])
        if time.monotonic() - self._saved_s > _SAVE_EVERY_S:
            self._save(runner)

    # Files

    def _after_epoch(self, runner: Runner, mode: str = 'train') -> None:
        if self._run is not None and self._run['samples'][mode]:
            self._save(runner)

    def after_run(self, runner: Runner) -> None:
        """Writes the files, also if nothing was sampled, and says where."""
        if self._run is not None and self._save(runner):
            runner.logger.info(f'Runtime benchmark: {self._folder / MARKDOWN_NAME}')

    def _save(self, runner: Runner) -> bool:
        """Whether the files could be written; a training goes on without them."""
        try:
            self._write()
        except OSError as error:
            runner.logger.warning(f'RuntimeBenchmarkHook: not saved: {error}')
            return False
        return True

    def _write(self) -> None:
        self._saved_s = time.monotonic()
        runs = [*self._earlier, self._run]
        backend = AtomicLocalBackend()
        backend.put_text(to_json(runs), self._folder / JSON_NAME)
        backend.put_text(markdown(runs), self._folder / MARKDOWN_NAME)


def _optim_wrappers(runner: Runner) -> list[OptimWrapper]:
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return list(wrapper.values())
    return [wrapper]


def _ms_since(start_s: float) -> float:
    return (time.perf_counter() - start_s) * 1e3


def _scalars(prefix: str, sample: dict[str, Any]) -> dict[str, float]:
    scalars = {f'{prefix}/total_ms': sample['total_ms']}
    for name, value in sample['phases_ms'].items():
        scalars[f'{prefix}/{name}_ms'] = value
    for name, times in sample['modules'].items():
        scalars[f'{prefix}/{name}/forward_ms'] = times['forward_ms']
        if 'backward' in sample['phases_ms']:
            scalars[f'{prefix}/{name}/backward_ms'] = times['backward_ms']
    return scalars
