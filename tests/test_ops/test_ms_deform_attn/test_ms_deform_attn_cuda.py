"""ms_deform_attn's Triton kernels on a GPU, bfloat16 included."""

import dataclasses

import pytest
import torch
from ms_deform_cases import MsDeformCase
from torch.testing import assert_close

pytest.importorskip('triton')

from triton_cases import assert_as_good_as, poisoned_memory, to_double

from deform_gqa.ops import ms_deform_attn

pytestmark = pytest.mark.cuda

ATOL = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
CASE = MsDeformCase(
    queries=301,
    heads=8,
    value_heads=8,
    points=4,
    dim=32,
    shapes=((25, 42), (13, 21), (7, 11), (4, 6)),
)
CASES = {
    'base': CASE,
    'grouped': dataclasses.replace(CASE, value_heads=2),
    'one value head': dataclasses.replace(CASE, value_heads=1),
    'logits': dataclasses.replace(CASE, logits=True),
    'large logits': dataclasses.replace(CASE, logits=True, shift=300.0),
    'edges': dataclasses.replace(CASE, places='edges'),
    'strided': dataclasses.replace(CASE, strided=True, seed=1),
    'thin levels': dataclasses.replace(CASE, shapes=((1, 301), (97, 1), (1, 1))),
    'empty level': dataclasses.replace(CASE, shapes=((25, 42), (0, 7), (4, 6))),
    'three points': dataclasses.replace(CASE, points=3, logits=True),
    'one query': dataclasses.replace(CASE, queries=1),
    'encoder': dataclasses.replace(
        CASE, queries=16_800, shapes=((100, 168), (50, 84), (25, 42), (13, 21))
    ),
}


def draw_inputs(case, dtype):
    return [x.detach().cuda().requires_grad_() for x in case.inputs(dtype)]


def check(case, dtype):
    inputs = draw_inputs(case, dtype)
    with poisoned_memory():
        actual = case.run(inputs, 'triton')
    expected = case.run(inputs, 'naive')
    exact = case.run(to_double(inputs), 'naive')
    assert_as_good_as(actual, expected, exact, ATOL[dtype])


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('dtype', list(ATOL))
@pytest.mark.parametrize('name', list(CASES))
def test_equals_naive(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize('dtype', list(ATOL))
@pytest.mark.parametrize('dim', [8, 16, 24, 40, 64, 128, 256])
def test_head_dims(dim, dtype):
    check(dataclasses.replace(CASE, heads=4, value_heads=2, dim=dim), dtype)


@pytest.mark.parametrize(
    'empty', [dict(batch=0), dict(queries=0), dict(shapes=((0, 3),))]
)
def test_empty(empty):
    """No launch without programs, and none reads levels without pixels."""
    case = dataclasses.replace(CASE, **empty)
    inputs = draw_inputs(case, torch.float32)
    out, *grads = case.run(inputs, 'triton')
    assert out.shape == (case.batch, case.queries, 256) and not out.any()
    for grad, x in zip(grads, inputs, strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize('backend', ['torch', 'triton'])
@pytest.mark.parametrize('logits', [False, True])
@pytest.mark.parametrize('dtype', list(ATOL))
def test_deterministic_mode(dtype, logits, backend, deterministic):
    """The same bits twice; many samples of every pixel."""
    case = dataclasses.replace(CASE, shapes=((5, 7), (3, 4)), logits=logits)
    inputs = draw_inputs(case, dtype)
    first, second = (case.run(inputs, backend) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    torch.use_deterministic_algorithms(False)  # grid_sample has no such backward
    exact = case.run(to_double(inputs), 'naive')
    assert_as_good_as(first, case.run(inputs, 'naive'), exact, ATOL[dtype])


@pytest.mark.parametrize('value', [float('inf'), float('nan'), 1e30])
def test_locations_that_are_no_place(value):
    results = []
    for replacement in (value, 9.0):
        inputs = draw_inputs(CASE, torch.float32)
        with torch.no_grad():
            inputs[1][..., 0, 1] = replacement
        results.append(CASE.run(inputs, 'triton'))
    for a, e in zip(*results, strict=True):
        assert_close(a, e, rtol=1e-4, atol=1e-4)


def levels_on_gpu(case):
    shapes = torch.tensor(case.shapes, device='cuda')
    sizes = shapes.prod(1)
    return shapes, sizes.cumsum(0) - sizes


@pytest.mark.parametrize(
    ('backend', 'as_list'), [('triton', False), ('triton', True), ('torch', True)]
)
def test_nothing_waits_for_the_gpu(backend, as_list):
    """Levels on the GPU are read by the kernels; a list needs no reading."""
    value, locations, weights = (x.detach() for x in draw_inputs(CASE, torch.float16))
    levels = (list(CASE.shapes), None) if as_list else levels_on_gpu(CASE)
    call = value, *levels, locations, weights
    expected = ms_deform_attn(*call, backend=backend)
    torch.cuda.set_sync_debug_mode('error')
    try:
        out = ms_deform_attn(*call, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert torch.equal(out, expected)


@pytest.mark.parametrize('backend', ['naive', 'torch', 'triton'])
def test_levels_on_the_gpu(backend):
    value, locations, weights = (x.detach() for x in draw_inputs(CASE, torch.float32))
    out = ms_deform_attn(
        value, *levels_on_gpu(CASE), locations, weights, backend=backend
    )
    listed = ms_deform_attn(
        value, CASE.shapes, None, locations, weights, backend=backend
    )
    assert torch.equal(out, listed)


def test_compiles_without_graph_break():
    inputs = draw_inputs(CASE, torch.float16)
    levels = levels_on_gpu(CASE)

    def op(value, locations, weights):
        return ms_deform_attn(value, *levels, locations, weights, backend='triton')

    results = []
    for function in (torch.compile(op, fullgraph=True), op):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.float().sum(), inputs)])
    for a, e in zip(*results, strict=True):
        assert_close(a, e, rtol=2e-3, atol=2e-3)


def test_auto_takes_triton_and_memory_is_bounded():
    """The samples of this call would take 262 MiB in bfloat16."""
    inputs = draw_inputs(CASES['encoder'], torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    CASES['encoder'].run(inputs, 'auto')
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20


def test_more_rows_than_a_grid_has_in_y():
    case = dataclasses.replace(
        CASE, batch=1, queries=70_000, heads=1, value_heads=1, dim=8
    )
    check(case, torch.float32)
