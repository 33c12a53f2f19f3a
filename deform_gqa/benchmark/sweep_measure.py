"""Measuring cases in turns, so that a machine's drift does not look like a trend."""

import dataclasses
from collections.abc import Sequence

import torch

from deform_gqa.profiling.memory import PeakMemory, quick_collections
from deform_gqa.profiling.timing import Timing

from .common_options import LATE, is_late
from .flops import count_flops
from .model_measure import Measurement, ModelCase, Unsupported, Workload
from .model_options import ModelOptions
from .progress import progress
from .report import Row
from .timing import Timer


@quick_collections()
def measure_interleaved(
    cases: Sequence[ModelCase], options: ModelOptions
) -> Measurement:
    """One sample of each case a round, as many rounds as fill the sampling time.

    All models of one backend are in memory at the same time.
    """
    timer = Timer(options.device, options.sampling)
    deadline = options.deadline()
    found = Measurement([], [])
    params: dict[str, int] = {}
    with progress(len(options.backends) * len(options.directions)) as step:
        for backend in options.backends:
            workloads, missing = _build_all(cases, backend)
            params |= {name: workload.params for name, workload in workloads.items()}
            for direction in options.directions:
                step(f'{backend} {direction}')
                found.rows += [
                    dataclasses.replace(r, direction=direction) for r in missing
                ]
                if is_late(deadline):
                    found.rows += [
                        Row(name, x.backend, direction, status='skipped', reason=LATE)
                        for name, x in workloads.items()
                    ]
                else:
                    found.rows += _rows(timer, cases, workloads, direction)
    found.cases += [
        {'name': c.name, **c.fields, 'batch': c.batch, 'params': params.get(c.name)}
        for c in cases
    ]
    return found


def _build_all(
    cases: Sequence[ModelCase], backend: str
) -> tuple[dict[str, Workload], list[Row]]:
    """Workloads by case, and rows without a direction for what cannot run."""
    workloads, missing = {}, []
    for case in cases:
        torch.manual_seed(0)
        try:
            workloads[case.name] = case.build(backend)
        except Unsupported as reason:
            missing.append(
                Row(case.name, backend, '', status='unsupported', reason=str(reason))
            )
    return workloads, missing


def _rows(
    timer: Timer,
    cases: Sequence[ModelCase],
    workloads: dict[str, Workload],
    direction: str,
) -> list[Row]:
    chosen = [case for case in cases if case.name in workloads]
    calls = [workloads[case.name].calls[direction] for case in chosen]
    counts = sorted(timer.warm_up(call) for call in calls)
    rounds = counts[len(counts) // 2] if counts else 0
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, samples, strict=True):
            taken += timer.sample(call, 1).samples_ms
    rows = []
    for case, call, taken in zip(chosen, calls, samples, strict=True):
        workload = workloads[case.name]
        with PeakMemory(timer.device) as memory:
            call()
        peak_mib = memory.extra_mib
        if peak_mib is not None:
            peak_mib += workload.arguments_mib
        rows.append(
            Row(
                case=case.name,
                backend=workload.backend,
                direction=direction,
                timing=Timing(tuple(taken)),
                peak_memory_mib=peak_mib,
                work={'flops': count_flops(call), 'images': case.batch},
            )
        )
    return rows
