"""The command tools/benchmark.py, whatever the suite."""

import subprocess
import sys

import pytest

CODE = """
import runpy, sys
sys.modules[{package!r}] = None  # as if it were not installed
sys.argv = ['benchmark.py', {suite!r}]
runpy.run_path({tool!r}, run_name='__main__')
"""


@pytest.mark.parametrize(
    ('suite', 'package'), [('backbone', 'mmdet'), ('dataloader', 'mmengine')]
)
def test_missing_packages_are_named(benchmark_tool, suite, package):
    tool = benchmark_tool.__file__
    code = CODE.format(suite=suite, package=package, tool=tool)
    command = [sys.executable, '-c', code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    message = f'needs the package {package}, which is not installed'
    assert result.stderr == f'benchmark.py {suite}: error: {message}\n'
    assert (result.returncode, result.stdout) == (2, '')


def test_defects_of_ours_are_not_hidden(benchmark_tool, monkeypatch):
    monkeypatch.setitem(benchmark_tool.SUITES, 'op', 'deform_gqa.benchmark.no_suite')
    with pytest.raises(ModuleNotFoundError, match='no_suite'):
        benchmark_tool.main(['op'])
