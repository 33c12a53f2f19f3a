"""``backbone --breakdown``: time and peak memory by part: attention by letter, MLPs.

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
from deform_gqa.profiling.markdown import number, records_table
from deform_gqa.profiling.memory import PeakMemory, unmeasurable_reason
from deform_gqa.profiling.module_timing import ModuleTimer, callable_modules, tensors_of
from deform_gqa.profiling.timing import Timing

from ..core import figures
from ..core.cases import FORWARD, Case
from ..core.report import Report, Row
from ..core.run import Task, measure
from ..core.sampling import Timer
from ..core.tables import document, missing_lines, ratio
from ..core.writer import publish
from .options import ModelOptions

ALL, REST = 'all', 'rest'
STAGE = 'stage '
NOTES = (
    'Times of a part are those of its modules in a running model, forward and (in '
    '`train`) backward together; `rest` is what lies between them. Memory of a part is '
    'the largest peak of one of its calls over the use at its start, so parts do not '
    'add up; that of `all` is the peak of the whole call. One sample of all parts a '
    'call, medians over the samples.'
)
Groups = dict[str, list[nn.Module]]


def run_breakdown(command: str, options: ModelOptions, cases: Sequence[Case]) -> None:
    """Measure the parts, print the tables, and write the files if --out is given."""
    sampler = PartSampler()
    groups = [[case] for case in cases]
    rows = measure(groups, options, sampler, counts_flops=False)
    parts, described = sampler.parts.values(), options.describe()
    report = Report.of('breakdown', command, options.device, described, parts, rows)
    markdown, pictures = breakdown_markdown(report), breakdown_pictures(report)
    publish('breakdown', report.to_json(), markdown, options.out, pictures)


# Parts


def parts_of(model: nn.Module) -> Groups:
    """Disjoint groups of modules by what they are, and again those of each stage.

    The latter's names begin with ``STAGE``. A stock backbone has its children.
    """
    if not isinstance(model, DAT):
        return {name: callable_modules(x) for name, x in model.named_children()}
    types: Groups = {'stem': [model.patch_proj]}
    stages: Groups = {}
    for stage, name, module in _stage_parts(model):
        types.setdefault(name, []).append(module)
        stages.setdefault(f'{STAGE}{stage} {name}', []).append(module)
    types['downsampling'] = list(model.down_projs)
    types['output norms'] = [model.norms[i] for i in model.out_indices]
    return types | stages


def _stage_parts(model: DAT) -> Iterator[tuple[int, str, nn.Module]]:
    """(stage from 1, what it is, module)."""
    for index, stage in enumerate(model.stages, start=1):
        for letter, module in zip(stage.letters, stage.attns, strict=True):
            yield index, f'{letter}: {type(module).__name__}', module
        lists = {'MLP': stage.mlps, 'norms': stage.layer_norms}
        lists['LPU'] = stage.local_perception_units
        for name, modules in lists.items():
            for module in modules:
                if not isinstance(module, nn.Identity):
                    yield index, name, module


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
    groups = parts_of(model)
    types = [name for name in groups if not name.startswith(STAGE)]
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


# Tables and pictures


def breakdown_markdown(report: Report) -> str:
    """For every case and direction: by type of block, and by stage."""
    parts: list[str | None] = [NOTES]
    for heading, cases in subjects(report).items():
        for direction in report.options['directions']:
            rows = [row for row in report.rows if row.direction == direction]
            parts.append(f'## {heading}: {direction}')
            for by_stage in (False, True):
                chosen = [c for c in cases if c['part'].startswith(STAGE) == by_stage]
                parts.append(part_table(chosen, rows) if chosen else None)
    return document(report, 'Breakdown', *parts, missing_lines(report.rows))


def subjects(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Cases by the backbone and shape that they are parts of."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in report.cases:
        heading = f'{case["backbone"]}, {case["image"]} px, batch {case["batch"]}'
        if case['kv heads']:
            heading += f', {case["kv heads"]} kv heads'
        found.setdefault(heading, []).append(case)
    return found


def part_table(cases: Sequence[dict[str, Any]], rows: Sequence[Row]) -> str:
    """A line a part; median ms and MiB of each backend, ratios of first to last."""
    names = {case['name'] for case in cases}
    found = {(row.case, row.backend): row for row in rows if row.case in names}
    backends = list(dict.fromkeys(backend for _, backend in found))
    records = []
    for case in cases:
        chosen = [found.get((case['name'], backend)) for backend in backends]
        times = [row.timing.median_ms if row else None for row in chosen]
        peaks = [row.peak_memory_mib if row else None for row in chosen]
        records.append(
            {
                'part': case['part'],
                'calls': str(case['calls']),
                **_side_by_side('ms', backends, times),
                **_side_by_side('MiB', backends, peaks),
            }
        )
    return records_table(records)


def _side_by_side(
    unit: str, backends: Sequence[str], values: Sequence[float | None]
) -> dict[str, str]:
    """Each value, then how many times the last the first is."""
    cells = {
        f'{backend} {unit}': '' if value is None else number(value)
        for backend, value in zip(backends, values, strict=True)
    }
    if len(values) > 1:
        cells[f'{unit} ratio'] = ratio(values[0], values[-1]) if values[0] else ''
    return cells


def breakdown_pictures(report: Report) -> dict[str, Callable[[], Any]]:
    """One of each backbone and shape."""
    return {
        f'breakdown-{index}': functools.partial(breakdown_figure, report, heading)
        for index, heading in enumerate(subjects(report), start=1)
    }


def breakdown_figure(report: Report, heading: str):
    """Time and memory of one backbone by type of block; stages are in the tables."""
    cases = [c for c in subjects(report)[heading] if not c['part'].startswith(STAGE)]
    cases.sort(key=lambda case: case['part'] != ALL)
    labels = {case['name']: case['part'] for case in cases}
    return figures.time_and_memory(report, labels, f'{heading}: parts')
