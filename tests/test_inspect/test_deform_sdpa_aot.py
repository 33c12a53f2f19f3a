"""Compiles deform_sdpa's kernels for GPUs that are not there and reads the code."""

import os

import pytest
import torch

pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels do not compile', allow_module_level=True)

from deform_gqa.inspect import aot, sdpa_report
from deform_gqa.inspect.sdpa_report import all_launches, report_points


def reports(arch, head_dim, dtype, heads_per_kv):
    """Of forward, backward and deterministic backward, none of which spills."""
    found = [
        report_points(launch, arch)
        for launch in all_launches(arch, head_dim, dtype, heads_per_kv)
    ]
    for x in found:
        assert x.kernel.stack_bytes == 0 and x.kernel.local_bytes == 0, x
        assert x.kernel.shared_bytes <= aot.SHARED_LIMITS[arch], x
    return found


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('head_dim', [32, 64])
@pytest.mark.parametrize('arch', [80, 90])
def test_one_sample_serves_eight_heads(arch, head_dim, dtype):
    forward, backward, _ = reports(arch, head_dim, dtype, 8)
    # Four corners of k and of v, 16 bytes a lane.
    assert (forward.map_loads, forward.load_bytes, forward.heads) == (8, 16, 8)
    assert forward.barriers == 0
    # Half of the lanes load those of k, the other half those of v.
    assert (backward.map_loads, backward.load_bytes) == (4, 16)
    if arch >= 90:  # four numbers by one atomic; older GPUs have none for float32
        assert (backward.atomics, backward.atomic_bytes) == (8, 16)
        assert backward.heads == 8
        assert backward.barriers == 0


@pytest.mark.parametrize('head_dim', [32, 256])
@pytest.mark.parametrize('heads', [1, 2, 4, 8])
@pytest.mark.parametrize('arch', [80, 90])
def test_corners_are_loaded_by_sixteen_bytes(arch, heads, head_dim):
    for x in reports(arch, head_dim, torch.bfloat16, heads):
        assert x.load_bytes == 16, x
        assert x.other_loads == 2, x  # x and y of a point
        if arch >= 90 and x.name == 'deform_sdpa_bwd_kernel':
            # Four numbers an atomic, for each corner of k and of v
            assert (x.atomics, x.atomic_bytes) == (2 * x.map_loads, 16)
            assert x.barriers == 0


@pytest.mark.parametrize(
    ('arch', 'head_dim', 'dtype', 'heads'),
    [
        (80, 16, torch.float32, 1),
        (80, 64, torch.float32, 8),
        (80, 128, torch.float16, 4),
        (80, 256, torch.bfloat16, 8),
        (90, 32, torch.float32, 4),
        (90, 64, torch.float16, 4),
        (90, 128, torch.bfloat16, 4),
        (90, 256, torch.bfloat16, 1),
    ],
)
def test_nothing_spills(arch, head_dim, dtype, heads):
    reports(arch, head_dim, dtype, heads)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_grouped_heads_take_fewer_instructions(dtype):
    """Per (query, point, query head), of eight heads a kv head against one."""
    for one, eight in zip(
        reports(90, 32, dtype, 1), reports(90, 32, dtype, 8), strict=True
    ):
        least = 2 if 'fixed' in one.name else 3
        assert one.per_head(one.instructions) > least * eight.per_head(
            eight.instructions
        )


def test_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(
        sdpa_report, 'all_launches', lambda *call: all_launches(*call)[:1]
    )
    sdpa_report.print_table([90], [32], [torch.float32, torch.bfloat16])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * len(sdpa_report.HEADS_PER_KV)
    assert all(line.startswith('deform_sdpa_fwd ') for line in lines[1:])
