"""Compiles every kernel for GPUs that are not there; see DESIGN's tests section."""

import functools
import os

import pytest
import torch

pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels do not compile', allow_module_level=True)

from deform_gqa.inspect import aot
from deform_gqa.inspect.representative import (
    CLASSIFICATION,
    IN_BETWEEN,
    TINY,
    attention,
    sampling,
)

KEYS_BY_WARP = 'deform_attn_dkdv_dbias_kernel'
DOTS = {
    'deform_attn_fwd_kernel',
    'deform_attn_dq_kernel',
    'deform_attn_dkdv_kernel',
    KEYS_BY_WARP,
}
# Instructions per (query, key) pair: a kernel that got much worse has lost a layout.
MOST_PER_PAIR = {
    'deform_attn_fwd_kernel': 27,
    'deform_attn_dq_kernel': 33,
    'deform_attn_dkdv_kernel': 90,
    KEYS_BY_WARP: 55,
}


@functools.cache
def reports(arch: int, head_dim: int, dtype: torch.dtype) -> list[aot.KernelReport]:
    launches = attention(arch, head_dim, dtype)
    return [aot.report_launch(launch, arch) for launch in launches]


def check_resources(report: aot.KernelReport) -> None:
    assert report.local_bytes == 0 and report.stack_bytes == 0, report
    assert report.shared_bytes <= aot.SHARED_LIMITS[report.arch], report


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('head_dim', [32, 64])
@pytest.mark.parametrize('arch', [80, 90])
def test_attention_kernels(arch, head_dim, dtype):
    found = reports(arch, head_dim, dtype)
    other = 'deform_attn_dkdv_kernel' if head_dim == 32 else KEYS_BY_WARP
    assert {r.name for r in found} == DOTS - {other} | {'bias_inputs_kernel'}
    for report in found:
        check_resources(report)
        if report.name in DOTS:
            assert report.tensor_core > 0, report
            assert report.per_pair['all'] <= MOST_PER_PAIR[report.name], report


@pytest.mark.parametrize('arch', [80, 90])
def test_sampling_kernels(arch):
    found = [aot.report_launch(x, arch) for x in sampling(arch, torch.bfloat16)]
    assert {r.name for r in found} == {
        'deform_sample_fwd_kernel',
        'deform_sample_bwd_kernel',
    }
    for report in found:
        check_resources(report)


@pytest.mark.parametrize(
    ('dtype', 'head_dim'),
    [(torch.bfloat16, d) for d in (16, 24, 40, 128, 200, 256)]
    + [(torch.float32, d) for d in (16, 32, 40, 64, 128, 256)],
)
@pytest.mark.parametrize('arch', [80, 90])
def test_other_head_dims(arch, dtype, head_dim):
    for report in reports(arch, head_dim, dtype):
        check_resources(report)
        assert report.tensor_core > 0 or report.name not in DOTS, report


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    'options',
    [
        dict(bias=False),
        dict(bias=False, dropout_p=0.1),
        dict(pos_in_range=False),
        dict(dropout_p=0.1),
    ],
)
def test_variants(options, dtype):
    for arch in (80, 90):
        for launch in attention(arch, 32, dtype, **options):
            check_resources(aot.report_launch(launch, arch))


@pytest.mark.parametrize('head_dim', [24, 32])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_deterministic_mode(dtype, head_dim):
    torch.use_deterministic_algorithms(True)
    try:
        launches = attention(90, head_dim, dtype, pos_in_range=False)
    finally:
        torch.use_deterministic_algorithms(False)
    for launch in launches:
        check_resources(aot.report_launch(launch, 90))


@pytest.mark.parametrize('maps', [CLASSIFICATION, IN_BETWEEN, TINY])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('arch', [80, 90])
def test_finer_tables(arch, dtype, maps):
    """A tile of keys sees more columns of the table the finer that is."""
    for head_dim in (32, 64):
        for launch in attention(arch, head_dim, dtype, maps=maps):
            check_resources(aot.report_launch(launch, arch))


@pytest.mark.parametrize(
    'options', [dict(), dict(maps=CLASSIFICATION), dict(bias=False)]
)
@pytest.mark.parametrize('heads_per_kv', [3, 8])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('arch', [80, 90])
def test_stacked_heads(arch, dtype, heads_per_kv, options):
    """Stacking all heads of a kv head costs no instructions."""
    options = dict(pos_in_range=False, **options)
    alone = attention(arch, 32, dtype, **options)
    stacked = attention(arch, 32, dtype, heads_per_kv=heads_per_kv, **options)
    for one, some in zip(alone, stacked, strict=True):
        if 'HS' not in some.arguments:  # the key-parallel kernel walks over heads
            continue
        assert some.arguments['HS'] == heads_per_kv
        one, some = aot.report_launch(one, arch), aot.report_launch(some, arch)
        check_resources(some)
        assert some.per_pair['all'] <= 1.05 * one.per_pair['all'], (one, some)
