"""deform_sdpa's Triton kernels on a GPU, bfloat16 included."""

import dataclasses

import pytest
import torch
from cases import output_and_gradients
from sdpa_cases import DeformSdpaCase, move_off_pixels
from torch.testing import assert_close

pytest.importorskip('triton')

from triton_cases import assert_as_good_as, poisoned_memory, to_double

from deform_gqa.ops import deform_sdpa

pytestmark = pytest.mark.cuda

ATOL = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
CASE = DeformSdpaCase(
    batch=2,
    query_views=3,
    heads=8,
    kv_heads=2,
    groups=None,
    queries=61,
    views=2,
    points=5,
    head_dim=32,
    grid_size=(11, 17),
    margin=0.1,
    strided=False,
    seed=0,
)
CASES = {
    'base': CASE,
    'mha': dataclasses.replace(CASE, kv_heads=8),
    'mqa': dataclasses.replace(CASE, kv_heads=1),
    'blocks of heads': dataclasses.replace(CASE, heads=24, kv_heads=2),
    'groups': dataclasses.replace(CASE, kv_heads=1, groups=4),
    'groups do not nest': dataclasses.replace(CASE, heads=6, kv_heads=2, groups=3),
    'out of range': dataclasses.replace(CASE, margin=2.0),
    'strided': dataclasses.replace(CASE, strided=True, seed=1),
    'row': dataclasses.replace(CASE, grid_size=(1, 301)),
    'column': dataclasses.replace(CASE, grid_size=(97, 1)),
    'pixel': dataclasses.replace(CASE, grid_size=(1, 1), queries=1),
    'large map': dataclasses.replace(CASE, grid_size=(200, 334), queries=500),
}


def draw_inputs(case, dtype):
    inputs = case.inputs(dtype)
    move_off_pixels(case, inputs[3])
    return [x.detach().cuda().requires_grad_() for x in inputs]


def run(case, backend, inputs, **options):
    def op(*tensors):
        return deform_sdpa(
            *tensors, grid_size=case.grid_size, backend=backend, **options
        )

    return output_and_gradients(op, inputs)


def check(case, dtype):
    inputs = draw_inputs(case, dtype)
    with poisoned_memory():
        actual = run(case, 'triton', inputs)
    expected = run(case, 'naive', inputs)
    exact = run(case, 'naive', to_double(inputs))
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
@pytest.mark.parametrize(
    ('head_dim', 'kv_heads'),
    [(8, 4), (16, 1), (24, 2), (40, 1), (64, 4), (96, 1), (128, 2), (256, 1)],
)
def test_head_dims(head_dim, kv_heads, dtype):
    case = dataclasses.replace(CASE, heads=4, kv_heads=kv_heads, head_dim=head_dim)
    check(case, dtype)


@pytest.mark.parametrize('dtype', list(ATOL))
@pytest.mark.parametrize(('head_dim', 'kv_heads'), [(32, 1), (32, 8), (256, 2)])
def test_deterministic_mode(head_dim, kv_heads, dtype, deterministic):
    """The same bits twice, from the sums in fixed point."""
    case = dataclasses.replace(CASE, kv_heads=kv_heads, head_dim=head_dim)
    inputs = draw_inputs(case, dtype)
    first, second = (run(case, 'triton', inputs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    torch.use_deterministic_algorithms(False)  # grid_sample has no such backward
    exact = run(case, 'naive', to_double(inputs))
    assert_as_good_as(first, run(case, 'naive', inputs), exact, ATOL[dtype])


def test_dropout_repeats_with_its_seed():
    inputs = draw_inputs(CASE, torch.bfloat16)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(run(CASE, 'triton', inputs, dropout_p=0.3))
    # Sums of dk and dv by atomics have no order.
    for i in (0, 1, 4):
        assert torch.equal(results[0][i], results[1][i])
        assert not torch.equal(results[0][i], results[2][i])


@pytest.mark.parametrize('value', [float('inf'), float('nan'), 1e30])
def test_coordinates_that_are_no_place(value):
    results = []
    for replacement in (value, 5.0):
        inputs = draw_inputs(CASE, torch.float32)
        with torch.no_grad():
            inputs[3][..., 1, 0] = replacement
        results.append(run(CASE, 'triton', inputs))
    for a, e in zip(*results, strict=True):
        assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_compiles_without_graph_break():
    inputs = draw_inputs(CASE, torch.float16)

    def op(*tensors):
        return deform_sdpa(*tensors, grid_size=CASE.grid_size, backend='triton')

    compiled = output_and_gradients(torch.compile(op, fullgraph=True), inputs)
    for a, e in zip(compiled, output_and_gradients(op, inputs), strict=True):
        assert_close(a, e, rtol=2e-3, atol=2e-3)


def test_auto_takes_triton_and_memory_is_bounded():
    """The sampled keys of this call would take 330 MiB in bfloat16, values as many."""
    case = dataclasses.replace(
        CASE,
        query_views=12,
        kv_heads=8,
        queries=196,
        views=12,
        points=12,
        grid_size=(14, 14),
    )
    inputs = draw_inputs(case, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(case, 'auto', inputs)
    assert torch.cuda.max_memory_allocated() - before < 150 * 2**20


def test_offsets_beyond_32_bits():
    """Points in the last corner of a map with more than 2**31 numbers."""
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip('needs 45 GiB of GPU memory')
    # Sides of a power of two plus one: pixels and fractions are exact in float32.
    side, corner, head_dim = 2**13 + 1, 2**3 + 1, 32
    case = dataclasses.replace(
        CASE, batch=1, views=1, heads=4, kv_heads=1, grid_size=(corner, corner)
    )
    assert side * side * head_dim > 2**31
    case = dataclasses.replace(case, margin=0.0, head_dim=head_dim)
    q, k, v, coords = (x.detach() for x in draw_inputs(case, torch.bfloat16))
    steps = 2**8  # of a cell
    coords = (coords * (corner - 1) * steps).floor() / ((corner - 1) * steps)
    small = [x.requires_grad_() for x in (q, k, v, coords)]
    large = []
    for x in (k, v):
        x_large = x.new_zeros(1, 1, 1, side * side, head_dim)
        pixels = x_large.view(side, side, head_dim)
        pixels[-corner:, -corner:] = x.detach().view(corner, corner, head_dim)
        large.append(x_large.requires_grad_())
    coords = coords.detach() * ((corner - 1) / (side - 1))
    coords = coords + (side - corner) / (side - 1)
    large_case = dataclasses.replace(case, grid_size=(side, side))
    inputs = [small[0], *large, coords.requires_grad_()]
    out, grad_q, *grad_maps, grad_coords = run(large_case, 'triton', inputs)
    expected = run(case, 'triton', small)
    assert_close(out, expected[0])
    assert_close(grad_q, expected[1])
    for grad, e in zip(grad_maps, expected[2:4], strict=True):
        grad = grad.view(side, side, head_dim)
        assert_close(grad[-corner:, -corner:].reshape(e.shape), e, rtol=0.02, atol=0.02)
        assert not grad[:-corner].any() and not grad[-corner:, :-corner].any()
    assert_close(grad_coords * ((corner - 1) / (side - 1)), expected[4])
