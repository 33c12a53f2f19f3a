"""The Triton kernels of neighborhood_attn on a GPU, bfloat16 included."""

import dataclasses

import pytest
import torch
from neighborhood_cases import NeighborhoodCase, outputs_and_gradients
from torch.testing import assert_close

pytest.importorskip('triton')

from triton_cases import assert_as_good_as, poisoned_memory, to_double

from deform_gqa.ops import neighborhood_attn

pytestmark = pytest.mark.cuda

ATOL = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
CASE = NeighborhoodCase(
    batch=2,
    heads=4,
    kv_heads=2,
    grid_size=(29, 38),
    kernel_size=7,
    dilation=1,
    head_dim=32,
    rpb=True,
    strided=False,
    seed=0,
)
CASES = {
    'base': CASE,
    'mha': dataclasses.replace(CASE, kv_heads=4),
    'mqa': dataclasses.replace(CASE, kv_heads=1),
    'no bias': dataclasses.replace(CASE, rpb=False),
    'dilated': dataclasses.replace(CASE, dilation=3),
    'strided': dataclasses.replace(CASE, strided=True, seed=1),
    'one window': dataclasses.replace(CASE, grid_size=(7, 7)),
    'row': dataclasses.replace(CASE, grid_size=(3, 301), kernel_size=3),
    'column': dataclasses.replace(CASE, grid_size=(97, 5), kernel_size=5),
    'K = 9': dataclasses.replace(CASE, kernel_size=9),
    'K = 11': dataclasses.replace(CASE, kernel_size=11),
    'K = 13': dataclasses.replace(CASE, kernel_size=13, dilation=2),
    'K = 21': dataclasses.replace(CASE, kernel_size=21),
}


def to_cuda(inputs):
    return [None if x is None else x.detach().cuda().requires_grad_() for x in inputs]


def run(case, backend, inputs, **options):
    return outputs_and_gradients(inputs, **case.options(), **options, backend=backend)


def check(case, dtype):
    inputs = to_cuda(case.inputs(dtype))
    with poisoned_memory():
        actual = run(case, 'triton', inputs)
    expected = run(case, 'naive', inputs)
    exact = run(case, 'naive', to_double(inputs))
    assert_as_good_as(actual, expected, exact, ATOL[dtype])


@pytest.mark.parametrize('dtype', list(ATOL))
@pytest.mark.parametrize('name', list(CASES))
def test_equals_naive(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize('dtype', list(ATOL))
@pytest.mark.parametrize('head_dim', [8, 24, 48, 64, 100, 128, 256])
def test_head_dims(head_dim, dtype):
    case = dataclasses.replace(CASE, batch=1, grid_size=(19, 21))
    check(dataclasses.replace(case, head_dim=head_dim), dtype)


@pytest.mark.parametrize('dtype', list(ATOL))
def test_deterministic_mode(dtype):
    inputs = to_cuda(CASE.inputs(dtype))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(CASE, 'triton', inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_dropout_repeats_with_its_seed():
    inputs = to_cuda(CASE.inputs(torch.bfloat16))
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(run(CASE, 'triton', inputs, dropout_p=0.3)[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_compiles_without_graph_break():
    inputs = to_cuda(CASE.inputs(torch.float16))

    def op(*tensors):
        return neighborhood_attn(*tensors, **CASE.options(), backend='triton')

    compiled = torch.compile(op, fullgraph=True)
    assert_close(compiled(*inputs), op(*inputs))


def test_auto_takes_triton_and_memory_is_bounded():
    """The keys and values of all windows would take 840 MB."""
    case = dataclasses.replace(CASE, batch=1, heads=2, kv_heads=2, grid_size=(200, 334))
    inputs = to_cuda(case.inputs(torch.bfloat16))
    grad_out = torch.randn_like(inputs[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = neighborhood_attn(*inputs, **case.options())
    torch.autograd.grad(out, inputs, grad_out)
    assert torch.cuda.max_memory_allocated() - before < 100 * 2**20
