"""Time and peak memory of a backbone by part: attention by block letter, MLPs, norms.

Times come from ``ModuleTimer``, memory from a pass of its own with a counter around
each module, as both would disturb each other.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deform_gqa.models.backbones import DAT
from deform_gqa.profiling.memory import PeakMemory, unmeasurable_reason
from deform_gqa.profiling.module_timing import ModuleTimer
from deform_gqa.profiling.timing import Timing

from ..core.cases import FORWARD
from ..core.report import Row
from ..core.run import Task
from ..core.sampling import Timer
from .workload import tensors_of

ALL, REST = 'all', 'rest'
Groups = dict[str, list[nn.Module]]


def type_groups(model: nn.Module) -> Groups:
    """Disjoint groups of modules by what they are; children of a stock backbone."""
    if not isinstance(model, DAT):
        return {name: list(_members(child)) for name, child in model.named_children()}
    groups: Groups = {'stem': [model.patch_proj]}
    for _, name, module in _stage_parts(model):
        groups.setdefault(name, []).append(module)
    groups['downsampling'] = list(model.down_projs)
    groups['output norms'] = [model.norms[i] for i in model.out_indices]
    return groups


def stage_groups(model: nn.Module) -> Groups:
    """The parts of each stage of a DAT; none for a stock backbone."""
    groups: Groups = {}
    if isinstance(model, DAT):
        for stage, name, module in _stage_parts(model):
            groups.setdefault(f'stage {stage} {name}', []).append(module)
    return groups


def _stage_parts(model: DAT) -> Iterator[tuple[int, str, nn.Module]]:
    """(stage from 1, what it is, module)."""
    for number, stage in enumerate(model.stages, start=1):
        for letter, module in zip(stage.letters, stage.attns, strict=True):
            yield number, f'{letter}: {type(module).__name__}', module
        lists = {'MLP': stage.mlps, 'norms': stage.layer_norms}
        lists['LPU'] = stage.local_perception_units
        for name, modules in lists.items():
            for module in modules:
                if not isinstance(module, nn.Identity):
                    yield number, name, module


def _members(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or those of a list, which is never called itself."""
    if isinstance(module, nn.ModuleList):
        for member in module:
            yield from _members(member)
    else:
        yield module


class PartSampler:
    """The run loop's sampler that makes a row of each part.

    Attributes:
        parts: What the report says of each part, by the case of its rows.
    """

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Any]] = {}

    def __call__(self, timer: Timer, tasks: Sequence[Task], count: int) -> list[Row]:
        return [row for task in tasks for row in self._rows_of(timer, task, count)]

    def _rows_of(self, timer: Timer, task: Task, count: int) -> Iterator[Row]:
        fields = {n: x for n, x in task.case.fields.items() if n != 'params'}
        for part, (timing, mib, calls) in _measure(timer, task, count).items():
            name = f'{task.case.name}/{part}'
            self.parts[name] = {'name': name, **fields, 'part': part, 'calls': calls}
            yield dataclasses.replace(
                task.row, case=name, timing=timing, peak_memory_mib=mib
            )


def _measure(
    timer: Timer, task: Task, count: int
) -> dict[str, tuple[Timing, float | None, int]]:
    """Times, peak memory and calls by part, the whole and the rest included."""
    model, call = task.workload.model, task.call
    types, stages = type_groups(model), stage_groups(model)
    groups = {**types, **stages}
    times: dict[str, list[float]] = {name: [] for name in (*groups, REST, ALL)}
    calls: dict[str, int] = {}
    for _ in range(count):
        with ModuleTimer(groups, timer.device) as modules:
            [total_ms] = timer.sample(call, 1)
        result = modules.result()
        for name, part in result.items():
            times[name].append(part.forward_ms + part.backward_ms)
            calls[name] = part.calls
        known_ms = sum(times[name][-1] for name in types)
        times[REST].append(max(total_ms - known_ms, 0.0))
        times[ALL].append(total_ms)
    backward = task.row.direction != FORWARD
    peaks = memory_by_group(call, groups, timer.device, backward)
    with PeakMemory(timer.device) as memory:
        call()
    peaks[ALL] = memory.extra_mib
    return {
        name: (Timing(tuple(taken)), peaks.get(name), calls.get(name, 1))
        for name, taken in times.items()
    }


def memory_by_group(
    call: Callable[[], Any],
    groups: Mapping[str, Sequence[nn.Module]],
    device: torch.device,
    backward: bool,
) -> dict[str, float | None]:
    """Largest peak of a module's forward or backward over the use at its start."""
    if unmeasurable_reason(device) is not None:
        return {}
    counters: dict[nn.Module, _ModuleMemory] = {}
    for modules in groups.values():
        for module in modules:
            if module not in counters:
                counters[module] = _ModuleMemory(module, device, backward)
    call()
    for counter in counters.values():
        counter.remove()
    return {
        name: max((counters[module].peak_mib for module in modules), default=0.0)
        for name, modules in groups.items()
    }


class _ModuleMemory:
    """Peak memory around the calls of one module, and around their gradients."""

    def __init__(self, module: nn.Module, device: torch.device, backward: bool):
        self.device = device
        self.backward = backward
        self.peak_mib = 0.0
        self.active: PeakMemory | None = None
        self.handles = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        self._stop()
        for handle in self.handles:
            handle.remove()

    def _start(self, *_: Any) -> None:
        self._stop()
        self.active = PeakMemory(self.device, collect=False).__enter__()

    def _stop(self, *_: Any) -> None:
        if self.active is not None:
            self.active.__exit__()
            self.peak_mib = max(self.peak_mib, self.active.extra_mib or 0.0)
            self.active = None

    def _before(self, _module: nn.Module, _inputs: Any) -> None:
        self._start()

    def _after(self, _module: nn.Module, inputs: Any, output: Any) -> None:
        self._stop()
        if not self.backward:
            return
        # The gradient of the output comes first, that of the input last.
        self._hook(tensors_of(output), self._start)
        self._hook(tensors_of(inputs), self._stop)

    @staticmethod
    def _hook(tensors: Sequence[Tensor], function: Callable[..., None]) -> None:
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(_quietly, function))


def _quietly(function: Callable[..., None], _gradient: Tensor) -> None:
    """A tensor hook that leaves the gradient as it is."""
    function()
