"""Rooms stand above what they use: no import runs back up."""

import subprocess
import sys

import pytest

UPPER = ('deform_gqa.benchmark', 'deform_gqa.engine', 'deform_gqa.models')


@pytest.mark.parametrize(
    ('module', 'absent'),
    [
        ('deform_gqa.profiling.runtime_report', (*UPPER, 'mmengine', 'matplotlib')),
        ('deform_gqa.profiling.step_timing', (*UPPER, 'mmengine', 'matplotlib')),
        ('deform_gqa.profiling.memory', (*UPPER, 'mmengine', 'matplotlib')),
        ('deform_gqa.engine', ('deform_gqa.benchmark',)),
        (
            'deform_gqa.benchmark.compare.suite',
            ('deform_gqa.benchmark.ops', 'deform_gqa.benchmark.models', 'mmengine'),
        ),
        ('deform_gqa.benchmark.gqa_sweep', ('mmengine', 'mmcv', 'mmdet')),
    ],
)
def test_imports_nothing_from_above(module, absent):
    code = (
        f'import sys, {module}\n'
        f'names = {absent!r}\n'
        'found = [n for n in sys.modules if n.startswith(names)]\n'
        'sys.exit(str(found) if found else 0)\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
