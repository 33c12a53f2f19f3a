"""Compiles ms_deform_attn's kernels for GPUs that are not there."""

import os

import pytest
import torch

pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels do not compile', allow_module_level=True)

from deform_gqa.inspect import aot, sass
from deform_gqa.inspect.representative import multi_scale

pytestmark = pytest.mark.aot

ARCHITECTURES = [80, 86, 89, 90, 100, 120]


def check(launches, arch):
    for launch in launches:
        report = aot.report_launch(launch, arch)
        assert report.local_bytes == 0 and report.stack_bytes == 0, report
        assert report.shared_bytes <= aot.SHARED_LIMITS[arch], report


@pytest.mark.parametrize('logits', [False, True])
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_nothing_spills(arch, logits):
    launches = multi_scale(arch, 32, torch.bfloat16, logits=logits)
    assert [launch.name for launch in launches] == [
        'ms_deform_attn_fwd_kernel',
        'ms_deform_attn_bwd_kernel',
    ]
    check(launches, arch)


@pytest.mark.parametrize(
    ('dtype', 'head_dim'),
    [
        (torch.float32, 32),
        (torch.float32, 256),
        (torch.float16, 24),
        (torch.bfloat16, 8),
        (torch.bfloat16, 64),
        (torch.bfloat16, 256),
    ],
)
@pytest.mark.parametrize('arch', [80, 90])
def test_other_head_dims(arch, dtype, head_dim):
    check(multi_scale(arch, head_dim, dtype), arch)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('arch', [80, 90])
def test_deterministic_mode(arch, dtype):
    torch.use_deterministic_algorithms(True)
    try:
        launches = multi_scale(arch, 32, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    check(launches, arch)


@pytest.mark.parametrize('arch', [80, 90])
def test_accesses_are_wide(arch):
    """A pixel by 16 bytes a lane, or by 8 for each half; 16-byte atomics on sm_90."""
    found = []
    for launch in multi_scale(arch, 32, torch.bfloat16):
        kernel = aot.compile_launch(launch, arch)
        code = sass.parse(aot.disassemble(kernel.asm['cubin']))
        found.append([sass.opcode(x) for x in code.instructions])
    forward, backward = found
    assert sum(x.startswith('LDG') and '.128' in x for x in forward) >= 4
    assert sum(x.startswith('LDG') and '.64' in x for x in backward) >= 8
    if arch == 90:
        atomics = [x for x in backward if x.startswith('RED')]
        assert len(atomics) == 8 and all('F32x4' in x for x in atomics)
        assert not any(x.startswith(('BAR', 'LDS', 'STS')) for x in backward)
