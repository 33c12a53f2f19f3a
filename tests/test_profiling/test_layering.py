"""Rooms stand above what they use: no import runs back up."""

import subprocess
import sys

import pytest

ABOVE_PROFILING = ('benchmark', 'engine', 'models')
PROFILING = ('runtime_report', 'step_timing', 'memory', 'environment')


@pytest.mark.parametrize(
    ('modules', 'absent'),
    [
        (
            [f'deform_gqa.profiling.{name}' for name in PROFILING],
            (*[f'deform_gqa.{name}' for name in ABOVE_PROFILING], 'mmengine'),
        ),
        (['deform_gqa.engine'], ('deform_gqa.benchmark',)),
        (
            ['deform_gqa.benchmark.compare.suite'],
            ('deform_gqa.benchmark.ops', 'deform_gqa.benchmark.models', 'mmengine'),
        ),
    ],
)
def test_imports_nothing_from_above(modules, absent):
    code = (
        f'import sys, {", ".join(modules)}\n'
        f'names = {absent!r}\n'
        'found = [n for n in sys.modules if n.startswith(names)]\n'
        'sys.exit(str(found) if found else 0)\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
