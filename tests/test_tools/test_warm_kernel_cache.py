"""warm_kernel_cache.py: which kernels it compiles, and where it puts them."""

import importlib.util
import os
import shlex
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels do not compile', allow_module_level=True)

from deform_gqa.inspect.kernel_cache import compile_only

CLI = Path(__file__).parents[2] / 'tools/warm_kernel_cache.py'
OP = shlex.split(
    'deform_attn --dtype bf16 --sizes 60x92 --stages 1 --batch-sizes 1 '
    '--kv-heads full --device cuda'
)
CUDA_TESTS = """
import pytest, torch
@pytest.mark.cuda
@pytest.mark.parametrize('i', range(4))
def test_gpu(i):
    assert torch.zeros(1).cuda().device.type == 'cuda'
@pytest.mark.cuda
def test_stopped():
    raise RuntimeError('no launch')
def test_other():
    raise RuntimeError('not selected')
"""


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location('warm_kernel_cache', CLI)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_gpu_check_runs_is_compiled(tool):
    commands = tool.commands()
    files = [
        word
        for command in commands
        for word in tool.arguments_of(command, '-m', 'pytest') or []
        if word.endswith('.py')
    ]
    assert 'tests/test_ops/test_deform_attn/test_deform_attn_cuda.py' in files
    suites = [tool.arguments_of(command, tool.BENCHMARK, 'op') for command in commands]
    assert {suite[0] for suite in suites if suite} >= {
        'deform_attn',
        'deform_sdpa',
        'ms_deform_attn',
        'neighborhood_attn',
    }


def test_cases_are_those_of_a_gpu_and_of_the_gate(tool):
    ((small, dtype),) = tool.op_cases(OP)
    assert small.grid_size == (15, 23) and dtype == torch.bfloat16
    large = list(tool.op_cases([*OP, '--sizes', '800x1333', '--batch-sizes', '8']))
    assert len(large) == 2  # the gate checks a smaller one
    assert large[0][0].pairs < large[1][0].pairs


def test_a_case_compiles_forward_and_backward(tool, monkeypatch, tmp_path):
    """With the compiler itself taken out."""
    compiled = []

    def compile(source, target, options):
        compiled.append(source.name)
        raise KeyboardInterrupt

    ((case, dtype),) = tool.op_cases(OP)
    monkeypatch.setattr('triton.compiler.compile', compile)
    with compile_only(90), pytest.raises(KeyboardInterrupt):
        tool.run_case(case, dtype)
    assert compiled == ['bias_inputs_kernel']


def test_each_process_runs_its_share_of_the_gpu_tests(tool, tmp_path, monkeypatch):
    path = tmp_path / 'test_gpu.py'
    path.write_text(CUDA_TESTS)
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    ran, protocol = [], tool.OneShare.pytest_exception_interact

    def interact(self, node, call):
        ran.append(node.name)
        protocol(self, node, call)

    monkeypatch.setattr(tool.OneShare, 'pytest_exception_interact', interact)
    stopped = [tool.run_tests([str(path)], index, 2) for index in range(2)]
    assert len(ran) == 5 and set(ran) == {
        'test_stopped',
        *(f'test_gpu[{i}]' for i in range(4)),
    }
    assert stopped[1] == []
    assert len(stopped[0]) == 1 and 'RuntimeError: no launch' in stopped[0][0]


def test_unpack_says_where(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path / 'cache'))
    tool.pack([], tmp_path / 'kernels.tar.gz')
    tool.main(['--unpack', str(tmp_path / 'kernels.tar.gz')])
    assert f'0 kernels put into {tmp_path / "cache"}' in capsys.readouterr().out


def test_archive_and_report(tool, tmp_path, monkeypatch, capsys):
    """Two threads in place of processes that find nothing to compile."""
    monkeypatch.setattr(tool, 'commands', list)
    monkeypatch.setattr(torch, 'set_num_threads', lambda count: None)
    monkeypatch.setenv('TRITON_CACHE_DIR', 'as before')
    threads = SimpleNamespace(Pool=ThreadPool)
    monkeypatch.setattr(tool.multiprocessing, 'get_context', lambda method: threads)
    shares = []

    def run_tests(files, index, count):
        shares.append((index, count))
        return [f'share {index}'] if index else []

    monkeypatch.setattr(tool, 'run_tests', run_tests)
    out = tmp_path / 'work' / 'kernels.tar.gz'
    tool.main(['--workers', '2', '--out', str(out), '--arch', '80'])
    assert sorted(shares) == [(0, 2), (1, 2)]
    printed = capsys.readouterr().out
    assert '0 kernels for sm_80 by Triton' in printed and out.is_file()
    assert 'not compiled: share 1' in printed
    assert os.environ['TRITON_CACHE_DIR'] == str(tmp_path / 'work' / 'kernels_built')
