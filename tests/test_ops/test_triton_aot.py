"""Compiles every kernel for GPUs that are not there; see DESIGN's tests section."""

import functools
import os

import pytest
import torch

pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels do not compile', allow_module_level=True)

from deform_gqa.ops.triton_backend import aot
from deform_gqa.ops.triton_backend.representative import attention, sampling

DOTS = {'deform_attn_fwd_kernel', 'deform_attn_dq_kernel', 'deform_attn_dkdv_kernel'}
# Instructions per (query, key) pair: a kernel that got much worse has lost a layout.
MOST_PER_PAIR = {
    'deform_attn_fwd_kernel': 30,
    'deform_attn_dq_kernel': 35,
    'deform_attn_dkdv_kernel': 130,
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
    assert {r.name for r in found} == DOTS | {'pack_table_kernel', 'key_taps_kernel'}
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


def test_without_bias():
    """The same kernels as plain attention."""
    for launch in attention(90, 32, torch.bfloat16, bias=False):
        check_resources(aot.report_launch(launch, 90))
