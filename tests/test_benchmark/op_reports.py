"""Reports of the op suite with made-up times."""

import dataclasses
import json

import torch

from deform_gqa.benchmark.core.report import Report, Row
from deform_gqa.benchmark.ops.deform_attn import DeformAttnCase
from deform_gqa.benchmark.ops.deform_sdpa import SdpaSweep, sdpa_cases
from deform_gqa.benchmark.ops.neighborhood_attn import NeighborhoodAttnCase
from deform_gqa.benchmark.ops.roofline import count_work
from deform_gqa.benchmark.ops.workload import DIRECTIONS
from deform_gqa.profiling.timing import Timing

ROOFLINE_US = {'exp': 500.0, 'tensor': 100.0, 'memory': 50.0}


def as_described(case):
    """As a file has it."""
    return json.loads(json.dumps({'name': case.name, **case.describe()}))


def make_rows(case, rooflines):
    """naive takes stage milliseconds, torch half of it; triton is unsupported."""
    for direction in DIRECTIONS:
        common = dict(
            case=case.name,
            direction=direction,
            work=dict(pairs=10**6, exps=10**6, flops=10**9, bytes=10**6),
            roofline_us=ROOFLINE_US if rooflines else None,
        )
        for backend, factor in (('naive', 1.0), ('torch', 0.5)):
            ms = case.stage * factor
            yield Row(
                **common,
                backend=backend,
                timing=Timing((ms * 0.9, ms, ms * 1.1)),
                peak_memory_mib=100.0 * factor,
            )
        yield Row(**common, backend='triton', status='unsupported', reason='no GPU')


def make_report(rooflines=False, stages=(1, 2, 3, 4)):
    cases = [
        case
        for op in (DeformAttnCase, NeighborhoodAttnCase)
        if set(stages) & set(op.stages())
        for case in op.combinations([(800, 1333)], stages, [2], ['full', 'one'])
    ]
    return Report(
        suite='op',
        command='python tools/benchmark.py op',
        environment=dict(
            device='a device',
            device_type='cpu',
            threads=1,
            cpu_count=2,
            load_average=0.1,
            torch='2.0',
            triton=None,
            cuda=None,
            python='3.11',
            deform_gqa='0.1',
            commit='abc',
            date='today',
        ),
        options=dict(
            dtype='fp32',
            directions=list(DIRECTIONS),
            backends=['naive', 'torch', 'triton'],
        ),
        cases=[
            json.loads(json.dumps({'name': case.name, **case.describe()}))
            for case in cases
        ],
        rows=[row for case in cases for row in make_rows(case, rooflines)],
    )


def make_sdpa_report():
    """Two cases; naive grows with the points, torch does not."""
    report = make_report(rooflines=True, stages=(1,))
    sweep = SdpaSweep(((14, 18),), heads=(8,), views=(2,), points=(2, 12))
    cases = sdpa_cases(sweep, ['one'])
    report.cases[:] = [
        json.loads(json.dumps({'name': case.name, **case.describe()})) for case in cases
    ]
    work = dataclasses.asdict(count_work(cases[0], torch.float32, 'forward'))
    report.rows[:] = [
        Row(
            case=case.name,
            backend=backend,
            direction='forward',
            work=work,
            roofline_us=ROOFLINE_US,
            timing=Timing((1.0,)),
            peak_memory_mib=mib,
        )
        for case in cases
        for backend, mib in (('naive', case.points * 10.0), ('torch', 20.0))
    ]
    return report
