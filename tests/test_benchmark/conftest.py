"""tools/benchmark.py as a module: tools is no package."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / 'tools' / 'benchmark.py'


@pytest.fixture(scope='session')
def benchmark_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location('benchmark_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
