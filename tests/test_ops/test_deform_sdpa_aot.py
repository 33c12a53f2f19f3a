"""Compiles deform_sdpa's kernels for GPUs that are not there and reads the code."""

import os

import pytest
import torch

pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels do not compile', allow_module_level=True)

from deform_gqa.ops.triton_backend import aot, sdpa_report
from deform_gqa.ops.triton_backend.sdpa_report import report_points, sdpa_launches


def reports(arch, head_dim, dtype, heads_per_kv):
    """Of the forward and the backward kernel, neither of which spills."""
    found = [
        report_points(launch, arch)
        for launch in sdpa_launches(arch, head_dim, dtype, heads_per_kv)
    ]
    for x in found:
        assert x.kernel.stack_bytes == 0 and x.kernel.local_bytes == 0, x
        assert x.kernel.shared_bytes <= aot.SHARED_LIMITS[arch], x
    return found


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('head_dim', [32, 64])
@pytest.mark.parametrize('arch', [80, 90])
def test_one_sample_serves_eight_heads(arch, head_dim, dtype):
    forward, backward = reports(arch, head_dim, dtype, 8)
    # Four corners of k and of v, 16 bytes a lane.
    assert (forward.map_loads, forward.load_bytes) == (8, 16)
    assert forward.barriers == 0
    assert backward.map_loads == 8
    if arch >= 90:  # four numbers by one atomic; older GPUs have none for float32
        assert backward.atomics == 8
        assert backward.barriers == 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_grouped_heads_take_fewer_instructions(dtype):
    """Per (query, point, query head), of eight heads a kv head against one."""
    for one, eight in zip(
        reports(90, 32, dtype, 1), reports(90, 32, dtype, 8), strict=True
    ):
        assert one.instructions > 3 * eight.instructions


def test_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(
        sdpa_report, 'sdpa_launches', lambda *call: sdpa_launches(*call)[:1]
    )
    monkeypatch.setattr(aot, 'SHARED_LIMITS', {90: 0})
    sdpa_report.main()
    assert capsys.readouterr().out.count('deform_sdpa_fwd_kernel') == 8
