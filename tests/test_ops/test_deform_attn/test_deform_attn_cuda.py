"""The Triton kernels on a GPU, bfloat16 included."""

import dataclasses

import pytest
import torch
from cases import DeformAttnCase, draw_inputs
from torch.testing import assert_close

pytest.importorskip('triton')

from triton_cases import assert_as_good_as, poisoned_memory, to_double

from deform_gqa.ops import deform_attn, deform_sample

pytestmark = pytest.mark.cuda

ATOL = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
CASE = DeformAttnCase(
    batch=2,
    heads=4,
    kv_heads=2,
    groups=2,
    grid_size=(25, 42),
    keys=150,
    head_dim=32,
    table_size=(27, 31),
    reach=1.0,
    strided=False,
    seed=0,
)
CASES = {
    'base': CASE,
    'mha': dataclasses.replace(CASE, kv_heads=4, groups=1),
    'mqa': dataclasses.replace(CASE, kv_heads=1, groups=4),
    'own table': dataclasses.replace(CASE, table_size=(49, 83)),
    'fine table': dataclasses.replace(CASE, grid_size=(7, 5), table_size=(111, 90)),
    'no table': dataclasses.replace(CASE, table_size=None),
    'out of range': dataclasses.replace(CASE, reach=1.7),
    'strided': dataclasses.replace(CASE, strided=True, seed=1),
    'row': dataclasses.replace(CASE, grid_size=(1, 301)),
    'column': dataclasses.replace(CASE, grid_size=(97, 1)),
}


def to_cuda(inputs):
    return [None if x is None else x.detach().cuda().requires_grad_() for x in inputs]


def run(case, backend, inputs, **options):
    out = deform_attn(*inputs, grid_size=case.grid_size, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out)
    present = [x for x in inputs if x is not None]
    return [out, *torch.autograd.grad(out, present, grad)]


def check(case, dtype):
    inputs = to_cuda(draw_inputs(case, dtype))
    with poisoned_memory():
        actual = run(case, 'triton', inputs, pos_in_range=case.reach <= 1)
    expected = run(case, 'naive', inputs)
    exact = run(case, 'naive', to_double(inputs))
    assert_as_good_as(actual, expected, exact, ATOL[dtype])


@pytest.mark.parametrize('dtype', list(ATOL))
@pytest.mark.parametrize('name', list(CASES))
def test_equals_naive(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize('dtype', list(ATOL))
@pytest.mark.parametrize('head_dim', [8, 24, 40, 48, 64, 96, 128, 256])
def test_head_dims(head_dim, dtype):
    check(dataclasses.replace(CASE, head_dim=head_dim), dtype)


@pytest.mark.parametrize('dtype', list(ATOL))
def test_deterministic_mode(dtype):
    inputs = to_cuda(draw_inputs(CASE, dtype))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(CASE, 'triton', inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_dropout_repeats_with_its_seed():
    inputs = to_cuda(draw_inputs(CASE, torch.bfloat16))
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(run(CASE, 'triton', inputs, dropout_p=0.3)[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_compiles_without_graph_break():
    inputs = to_cuda(draw_inputs(CASE, torch.float16))

    def op(*tensors):
        return deform_attn(*tensors, grid_size=CASE.grid_size, backend='triton')

    compiled = torch.compile(op, fullgraph=True)
    assert_close(compiled(*inputs), op(*inputs))


def test_auto_takes_triton_and_memory_is_bounded():
    """An N x S bias of this call would take 840 MB in float32."""
    case = dataclasses.replace(CASE, grid_size=(200, 334), keys=1050, batch=1, heads=2)
    case = dataclasses.replace(case, kv_heads=2, groups=1, table_size=(111, 111))
    inputs = to_cuda(draw_inputs(dataclasses.replace(case), torch.bfloat16))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(case, 'auto', inputs, pos_in_range=True)
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20


@pytest.mark.parametrize('dtype', list(ATOL))
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_deform_sample(layout, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 96, 33, 47, generator=generator).to(dtype)
    x = x.contiguous(memory_format=layout)
    pos = torch.rand(2, 3, 201, 2, generator=generator) * 2.6 - 1.3
    inputs = to_cuda([x, pos])

    def run_sample(backend, tensors):
        out = deform_sample(*tensors, backend=backend)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return [out, *torch.autograd.grad(out, tensors, grad.to(out))]

    with poisoned_memory():
        actual = run_sample('triton', inputs)
    exact = run_sample('naive', to_double(inputs))
    assert_as_good_as(actual, run_sample('naive', inputs), exact, ATOL[dtype])
