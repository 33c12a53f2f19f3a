"""Every kernel for every architecture, as the layers of DAT-T++ launch it.

With the newest Triton and with that of torch 2.11 (marker ``aot``): code that is clean
from one can spill from the other.
"""

import os
import re

import pytest
import torch

pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels do not compile', allow_module_level=True)

from deform_gqa.inspect import aot, layers
from deform_gqa.inspect.representative import neighborhood, sampling
from deform_gqa.inspect.sdpa_report import all_launches

pytestmark = pytest.mark.aot

STAGE_3 = layers.layers(layers.IMAGES[0])[2]  # has the largest patch
# Query heads of a kv head: the most, and those that leave room for the most queries.
SHARING = {32: 8, 64: 2}
TENSOR_CORES = re.compile(r'mma\.sync|wgmma\.mma_async|tcgen05\.mma')
WITH_PRODUCTS = {
    'deform_attn_fwd_kernel',
    'deform_attn_dq_kernel',
    'deform_attn_dkdv_kernel',
    'deform_attn_dkdv_dbias_kernel',
    'neighborhood_fwd_kernel',
    'neighborhood_dq_kernel',
    'neighborhood_dkdv_kernel',
}


def launches(op: str, arch: int, head_dim: int) -> list[aot.Launch]:
    dtype = torch.bfloat16
    if op == 'deform_attn':
        return layers.launches(STAGE_3, arch, dtype, head_dim)
    if op == 'deform_sample':
        return sampling(arch, dtype)
    if op == 'deform_sdpa':
        return all_launches(arch, head_dim, dtype, SHARING[head_dim])
    return neighborhood(arch, head_dim, dtype)


def constants(launch: aot.Launch) -> tuple:
    """What a launch is compiled with, but for its architecture."""
    values = {
        name: value
        for name, value in launch.arguments.items()
        if not isinstance(value, torch.Tensor)
    }
    return launch.name, values, launch.options


def check(launch: aot.Launch, arch: int) -> None:
    kernel = aot.compile_launch(launch, arch)
    usage = aot.resource_usage(kernel.asm['cubin'])
    assert (usage['STACK'], usage['LOCAL']) == (0, 0), (launch.name, usage)
    assert kernel.metadata.shared <= aot.SHARED_LIMITS[arch], launch.name
    uses_tensor_cores = TENSOR_CORES.search(kernel.asm['ptx']) is not None
    assert uses_tensor_cores == (launch.name in WITH_PRODUCTS), launch.name


@pytest.mark.parametrize('head_dim', [32, 64])
@pytest.mark.parametrize('op', ['deform_attn', 'deform_sdpa', 'neighborhood_attn'])
@pytest.mark.parametrize('arch', [80, 90, 100, 120])
def test_kernels(arch, op, head_dim):
    for launch in launches(op, arch, head_dim):
        check(launch, arch)


@pytest.mark.parametrize('arch', [80, 90, 100, 120])
def test_sampling_kernels(arch):
    for launch in launches('deform_sample', arch, 32):
        check(launch, arch)


@pytest.mark.parametrize('head_dim', [32, 64])
def test_less_shared_memory_than_an_a100(head_dim):
    for launch in launches('deform_attn', 86, head_dim):
        check(launch, 86)


@pytest.mark.parametrize('head_dim', [32, 64])
def test_other_kernels_of_ampere_and_ada_are_those_of_an_a100(head_dim):
    """One code for compute capability 8.x, which needs little shared memory."""
    for op in ('deform_sdpa', 'neighborhood_attn', 'deform_sample'):
        a100 = launches(op, 80, head_dim)
        for arch in (86, 89):
            same = launches(op, arch, head_dim)
            assert list(map(constants, same)) == list(map(constants, a100))
        for launch in a100:
            kernel = aot.compile_launch(launch, 80)
            assert kernel.metadata.shared <= aot.SHARED_LIMITS[86], launch.name


@pytest.mark.parametrize('head_dim', [32, 64])
def test_ada_launches_what_ampere_does(head_dim):
    ampere, ada = (launches('deform_attn', arch, head_dim) for arch in (86, 89))
    assert list(map(constants, ada)) == list(map(constants, ampere))
