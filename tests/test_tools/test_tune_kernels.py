"""tune_kernels.py but for its timing, which needs a GPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton')

import triton
from triton.runtime.errors import OutOfResources

from deform_gqa.inspect import aot
from deform_gqa.ops.common import block_sizes as common
from deform_gqa.ops.common.block_sizes import BlockSizes
from deform_gqa.ops.deform_attn.block_sizes import block_sizes
from deform_gqa.ops.neighborhood_attn.block_sizes import (
    block_sizes as neighborhood_sizes,
)

CLI = Path(__file__).parents[2] / 'tools/tune_kernels.py'
BEST = BlockSizes(128, 32, 4, 2)


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location('tune_kernels', CLI)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def overrides(monkeypatch, tool, tmp_path):
    """A file of overrides in place of the package's, read anew."""
    path = tmp_path / 'block_sizes.json'
    monkeypatch.setattr(tool, 'OVERRIDES', path)
    monkeypatch.setattr(common, 'OVERRIDES', path)
    common._overrides.cache_clear()
    yield path
    common._overrides.cache_clear()


@pytest.fixture
def gpu(monkeypatch, tool):
    """An sm_90 on which BEST is the fastest and what fails is in ``failing``."""
    failing = set()

    def time_ms(call, op, sizes):
        if op in failing:
            return float('inf')
        return 1.0 if sizes == BEST else 2.0

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(tool, 'architecture', lambda device: 90)
    monkeypatch.setattr(tool, 'make_call', lambda *args: None)
    monkeypatch.setattr(tool, 'time_ms', time_ms)
    return failing


def run(monkeypatch, tool, *args):
    monkeypatch.setattr(sys, 'argv', ['tune_kernels.py', *args])
    tool.main()


def test_candidates(tool):
    found = tool.candidates()
    assert BEST in found and len(found) == len(set(found))
    for sizes in found:
        assert 8 <= sizes.queries * sizes.keys / (32 * sizes.warps) <= 64
        assert all(x & (x - 1) == 0 for x in (sizes.queries, sizes.keys, sizes.warps))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('head_dim', [16, 64, 128])
def test_ops_have_built_in_sizes(tool, head_dim, dtype):
    for op in tool.ops_of(head_dim, dtype):
        sizes = neighborhood_sizes if op in tool.NEIGHBORHOOD_OPS else block_sizes
        for arch in (80, 90):
            assert sizes(op, head_dim, dtype, arch).keys >= 16


@pytest.mark.parametrize('op', ['deform_attn_dq', 'neighborhood_fwd'])
def test_call_launches_the_kernel_that_is_tuned(monkeypatch, tool, op):
    """On the CPU, with the launches themselves taken out."""
    draw, rand = torch.randn, torch.rand
    monkeypatch.setattr(torch, 'randn', lambda shape, device: draw(shape))
    monkeypatch.setattr(torch, 'rand', lambda *shape, device: rand(shape))
    with aot.record_launches(90):
        call = tool.make_call(op, 32, torch.float16, 1)
    with aot.record_launches(90) as launches:
        call()
    assert f'{op}_kernel' in {launch.name for launch in launches}


def test_writes_what_the_kernels_then_use(monkeypatch, tool, overrides, gpu):
    other = {'queries': 64, 'keys': 16, 'warps': 4, 'stages': 1}
    overrides.write_text(json.dumps({'deform_attn_fwd/32/float16/sm_80': other}))
    run(monkeypatch, tool, '--head-dim', '24', '128', '--dtype', 'bfloat16')
    written = json.loads(overrides.read_text())
    assert written.pop('deform_attn_fwd/32/float16/sm_80') == other
    assert set(written) == {
        'deform_attn_fwd/32/bfloat16/sm_90',
        'deform_attn_dq/32/bfloat16/sm_90',
        'deform_attn_dkdv_dbias/32/bfloat16/sm_90',
        'deform_attn_fwd/128/bfloat16/sm_90',
        'deform_attn_dq/128/bfloat16/sm_90',
        'deform_attn_dkdv/128/bfloat16/sm_90',
        'deform_attn_dbias/128/bfloat16/sm_90',
        *(
            f'{op}/{head_dim}/bfloat16/sm_90'
            for op in tool.NEIGHBORHOOD_OPS
            for head_dim in (32, 128)
        ),
    }
    assert block_sizes('deform_attn_dq', 32, torch.bfloat16, 90) == BEST
    assert block_sizes('deform_attn_dq', 32, torch.bfloat16, 80) != BEST
    assert block_sizes('deform_attn_fwd', 32, torch.float16, 80) == BlockSizes(**other)


def test_dry_run_writes_nothing(monkeypatch, tool, overrides, gpu, capsys):
    run(monkeypatch, tool, '--dtype', 'float32', '--dry-run')
    assert not overrides.exists()
    assert 'deform_attn_dbias/32/float32/sm_90' in capsys.readouterr().out


def test_keeps_what_was_tuned_before_a_failure(monkeypatch, tool, overrides, gpu):
    gpu.add('deform_attn_dq')
    with pytest.raises(SystemExit, match='no block sizes of deform_attn_dq fit'):
        run(monkeypatch, tool, '--dtype', 'float16')
    assert list(json.loads(overrides.read_text())) == [
        'deform_attn_fwd/32/float16/sm_90'
    ]


def test_needs_a_gpu(monkeypatch, tool):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='needs an NVIDIA GPU'):
        run(monkeypatch, tool)


def test_times_one_op_and_leaves_the_others(monkeypatch, tool):
    def bench(call, return_mode):
        assert return_mode == 'median'
        return call()

    def call():
        ask = ('deform_attn_fwd', 'deform_attn_dq')
        chosen = [block_sizes(op, 32, torch.float16, 90) for op in ask]
        assert chosen[0] == BEST
        assert chosen[1] == block_sizes('deform_attn_dq', 32, torch.float16, 90)
        return 3.5

    monkeypatch.setattr(triton.testing, 'do_bench', bench)
    assert tool.time_ms(call, 'deform_attn_fwd', BEST) == 3.5


def test_sizes_that_do_not_fit_are_infinitely_slow(monkeypatch, tool):
    def bench(call, return_mode):
        raise OutOfResources(300_000, 232_448, 'shared memory')

    monkeypatch.setattr(triton.testing, 'do_bench', bench)
    assert tool.time_ms(None, 'deform_attn_fwd', BEST) == float('inf')
