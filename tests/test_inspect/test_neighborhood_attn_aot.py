"""Compiles neighborhood_attn's kernels for GPUs that are not there, reads the code."""

import os

import pytest
import torch

pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels do not compile', allow_module_level=True)

from deform_gqa.inspect import aot
from deform_gqa.inspect.representative import neighborhood

# Instructions per (query, key) pair of a tile, of the loop at borders, the longer one.
MOST_PER_PAIR = {
    'neighborhood_fwd_kernel': 22,
    'neighborhood_dq_kernel': 27,
    'neighborhood_dkdv_kernel': 32,
}


def check(launch: aot.Launch, arch: int) -> aot.KernelReport:
    report = aot.report_launch(launch, arch)
    assert report.local_bytes == 0 and report.stack_bytes == 0, report
    assert report.shared_bytes <= aot.SHARED_LIMITS[arch], report
    return report


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('head_dim', [32, 64])
@pytest.mark.parametrize('arch', [80, 90])
def test_kernels(arch, head_dim, dtype):
    reports = {
        launch.name: check(launch, arch)
        for launch in neighborhood(arch, head_dim, dtype)
    }
    assert reports.keys() == MOST_PER_PAIR.keys() | {'neighborhood_table_kernel'}
    for name, most in MOST_PER_PAIR.items():
        assert reports[name].tensor_core > 0, reports[name]
        assert reports[name].per_pair['all'] <= most, reports[name]


@pytest.mark.parametrize('kernel_size', [3, 13])
def test_kernel_sizes(kernel_size):
    for launch in neighborhood(90, 32, torch.bfloat16, kernel_size):
        check(launch, 90)


@pytest.mark.parametrize('arch', [80, 90])
def test_dropout(arch):
    """It needs more registers than a tile of the usual size leaves."""
    for launch in neighborhood(arch, 32, torch.bfloat16, dropout_p=0.1):
        check(launch, arch)


@pytest.mark.parametrize(
    ('head_dim', 'dtype'),
    [(24, torch.bfloat16), (40, torch.bfloat16), (200, torch.bfloat16)]
    + [(32, torch.float32), (40, torch.float32), (64, torch.float32)],
)
@pytest.mark.parametrize('arch', [80, 90])
def test_other_head_dims(arch, head_dim, dtype):
    for launch in neighborhood(arch, head_dim, dtype):
        check(launch, arch)
