"""The Triton kernels on the CPU, by the interpreter: TRITON_INTERPRET=1."""

import dataclasses

import pytest
import torch
from cases import (
    DeformAttnCase,
    draw_inputs,
    output_and_gradients,
    shift_logits,
    unshift_gradient,
)
from drawn_cases import small_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

pytest.importorskip('triton')

from triton_cases import (
    SIZES,
    assert_as_good_as,
    poisoned_memory,
    tile_sizes,
    to_double,
)

from deform_gqa.ops import deform_attn
from deform_gqa.ops.common.heads import repeat_kv
from deform_gqa.ops.deform_attn import naive
from deform_gqa.ops.deform_attn.api import deform_attn_op
from deform_gqa.ops.deform_attn.triton_call import deform_attn_call
from deform_gqa.ops.deform_attn.triton_launch import (
    _forward_launch,
    deform_attn_backward,
    deform_attn_forward,
)

pytestmark = pytest.mark.interpret

CASE = DeformAttnCase(
    batch=2,
    heads=4,
    kv_heads=2,
    groups=2,
    grid_size=(5, 9),
    keys=19,
    head_dim=16,
    table_size=(7, 6),
    reach=1.3,
    strided=False,
    seed=0,
)
ATOL = {torch.float32: 5e-5, torch.float16: 3e-3}


def run(case, backend, inputs, loss_scale=1.0, **options):
    def op(*tensors):
        return deform_attn(
            *tensors, grid_size=case.grid_size, backend=backend, **options
        )

    return output_and_gradients(op, inputs, loss_scale)


def check(case, dtype, shift=None, **options):
    inputs = draw_inputs(case, dtype)
    if shift is not None:
        shift_logits(*inputs[:2], shift)
    options = {'pos_in_range': case.reach <= 1, **options}
    with poisoned_memory():
        actual = run(case, 'triton', inputs, **options)
    expected = run(case, 'naive', inputs, **options)
    exact = run(case, 'naive', to_double(inputs), **options)
    if shift is not None:
        for tensors in (actual, expected, exact):
            tensors[1] = unshift_gradient(tensors[1], shift)
    loss_scale = options.get('loss_scale', 1.0)
    assert_as_good_as(actual, expected, exact, ATOL[dtype], loss_scale)


# Two of each 100 so that both workers of pytest-xdist have something to do.
@pytest.mark.parametrize('half', [0, 1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_equals_naive(dtype, half):
    @settings(max_examples=55, deadline=None, derandomize=True, database=None)
    @given(small_cases(), st.sampled_from(SIZES))
    def check_drawn(case, sizes):
        with tile_sizes(sizes):
            check(dataclasses.replace(case, seed=2 * case.seed + half), dtype)

    check_drawn()


@pytest.mark.parametrize('head_dim', [128, 200, 256])
def test_large_head_dims(head_dim):
    case = dataclasses.replace(CASE, batch=1, heads=2, groups=1, kv_heads=1)
    check(dataclasses.replace(case, head_dim=head_dim, keys=7), torch.float32)


@pytest.mark.parametrize(
    ('grid_size', 'table_size'),
    [
        ((1, 1), (1, 1)),
        ((1, 40), (5, 3)),
        ((3, 2), (40, 100)),  # steps of dozens of cells: patches one column wide
        ((33, 3), (5, 5)),  # several patches below each other
        ((20, 18), (9, 7)),  # sums over patch rows
    ],
)
@pytest.mark.parametrize('dtype', list(ATOL))
def test_shapes(grid_size, table_size, dtype):
    case = dataclasses.replace(CASE, batch=1, heads=1, kv_heads=1, groups=1, keys=9)
    case = dataclasses.replace(case, grid_size=grid_size, table_size=table_size)
    check(case, dtype)


@pytest.mark.parametrize('scale', [-0.7, 0.0, 1e-4, 3.0])
def test_scales(scale):
    case = dataclasses.replace(CASE, batch=1, heads=2, kv_heads=1, groups=1)
    check(case, torch.float32, scale=scale)


def assert_close_but_at_positions(actual, expected, dtype):
    """Gradients of positions jump where these are on cells of the table."""
    atol = 1e-4 if dtype == torch.float32 else 2e-2
    for i in (0, 1, 2, 3, 5):
        assert_close(actual[i].double(), expected[i], rtol=1e-4, atol=atol)


@pytest.mark.parametrize('dtype', list(ATOL))
def test_positions_on_the_border(dtype):
    """|pos| == 1 with the promise that it is never more."""
    case = dataclasses.replace(CASE, batch=1, reach=1.0)
    inputs = draw_inputs(case, dtype)
    with torch.no_grad():
        inputs[3][:, :, ::2] = inputs[3][:, :, ::2].sign()
    actual = run(case, 'triton', inputs, pos_in_range=True)
    expected = run(case, 'naive', to_double(inputs))
    assert_close_but_at_positions(actual, expected, dtype)


@pytest.mark.parametrize('dtype', list(ATOL))
def test_positions_on_cells(dtype):
    """All table coordinates are integers, odd and even, and some outside the table."""
    case = dataclasses.replace(CASE, batch=1, heads=1, kv_heads=1, groups=1)
    case = dataclasses.replace(case, table_size=(9, 17))
    inputs = case.inputs(dtype)
    with torch.no_grad():
        inputs[3].copy_((inputs[3] * 4).round() / 4 * torch.tensor([2.0, 1.0]))
    actual = run(case, 'triton', inputs)
    expected = run(case, 'naive', to_double(inputs))
    assert_close_but_at_positions(actual, expected, dtype)


@pytest.mark.parametrize('dtype', list(ATOL))
def test_far_and_non_finite_positions_have_no_bias(dtype):
    case = dataclasses.replace(CASE, batch=1, heads=1, kv_heads=1, groups=1)
    inputs = draw_inputs(case, dtype)
    far = [1e30, -1e30, float('inf'), -float('inf'), float('nan')]
    with torch.no_grad():
        inputs[3][0, :, : len(far)] = torch.tensor(far)[:, None]
    actual = run(case, 'triton', inputs)
    with torch.no_grad():
        inputs[3][0, :, : len(far)] = 9.0
    for a, e in zip(actual, run(case, 'triton', inputs), strict=True):
        assert_close(a, e)


@pytest.mark.parametrize('table', [True, False])
def test_empty_batch(table):
    case = dataclasses.replace(CASE, batch=0)
    case = case if table else dataclasses.replace(case, table_size=None)
    inputs = draw_inputs(case, torch.float32)
    for x, grad in zip(inputs, run(case, 'triton', inputs)[1:], strict=False):
        assert grad.shape == x.shape


@pytest.mark.parametrize('table', [True, False])
def test_deterministic_mode(table):
    case = CASE if table else dataclasses.replace(CASE, table_size=None)
    inputs = draw_inputs(case, torch.float32)
    expected = run(case, 'triton', inputs)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(case, 'triton', inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, e in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize(
    ('dtype', 'shift', 'loss_scale'),
    [(torch.float32, -95, 1), (torch.float16, -12, 1024), (torch.float16, -300, 65536)],
)
def test_keys_behind_the_last_one(dtype, shift, loss_scale, deterministic):
    """Their weight, exp(-lse), overflows where all logits are low."""
    case = dataclasses.replace(CASE, batch=1, heads=1, kv_heads=1, groups=1)
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(case, dtype, shift, loss_scale=loss_scale)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('dtype', list(ATOL))  # a kernel of dk/dv each
def test_gradients_of_positions_on_cells(dtype):
    """Where the table is a plane, they have no kink at its cells."""
    case = dataclasses.replace(CASE, batch=1, heads=1, kv_heads=1, groups=1)
    case = dataclasses.replace(case, grid_size=(17, 17), table_size=(9, 9), reach=1.0)
    inputs = case.inputs(dtype)
    steps = torch.tensor([-0.375, 0.0, 0.25, 0.5, 1.0])  # quarters of a cell
    with torch.no_grad():
        inputs[3].copy_(steps[torch.arange(inputs[3].numel()) % 5].view_as(inputs[3]))
        y, x = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing='ij')
        inputs[4].copy_(0.25 * y - 0.5 * x)
    actual = run(case, 'triton', inputs, pos_in_range=True)[4]
    expected = run(case, 'naive', to_double(inputs), pos_in_range=True)[4]
    assert expected.abs().max() > 1
    atol = 1e-4 if dtype == torch.float32 else 2e-2
    assert_close(actual.double(), expected, rtol=1e-3, atol=atol)


@pytest.mark.parametrize('table_size', [(9, 9), (5, 5)])
def test_positions_far_outside(table_size):
    """Some queries read beside the table, of others no key is near it."""
    case = dataclasses.replace(CASE, batch=1, heads=1, kv_heads=1, groups=1, reach=3.0)
    case = dataclasses.replace(case, grid_size=(18, 17), table_size=table_size)
    check(case, torch.float16)


@pytest.mark.parametrize('table_size', [(9, 9), (5, 5)])  # a kernel of dk/dv each
@pytest.mark.parametrize('poisoned', [0, 1])
def test_nan_reaches_every_gradient(poisoned, table_size):
    """A bound of the weights must not make numbers of what is none."""
    case = dataclasses.replace(
        CASE, batch=1, heads=1, kv_heads=1, groups=1, grid_size=(16, 16), reach=1.0,
        table_size=table_size,
    )  # fmt: skip
    inputs = draw_inputs(case, torch.float16)
    with torch.no_grad():
        inputs[poisoned][0, 0, 3, 2] = float('nan')
    actual = run(case, 'triton', inputs, pos_in_range=True)
    naive_ones = run(case, 'naive', inputs, pos_in_range=True)
    for a, n in zip(actual, naive_ones, strict=True):
        assert n.isnan().any() and a.isnan()[n.isnan()].all()


def test_one_key_less_than_a_tile():
    case = dataclasses.replace(CASE, batch=1, heads=1, kv_heads=1, groups=1, keys=15)
    case = dataclasses.replace(case, grid_size=(2, 3), table_size=None)
    inputs = draw_inputs(case, torch.float32)
    with tile_sizes(SIZES[0]):
        actual = run(case, 'triton', inputs)
    for a, e in zip(actual, run(case, 'naive', inputs), strict=True):
        assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_key_taps_of_more_keys_than_a_program_has():
    case = dataclasses.replace(CASE, batch=1, keys=300)
    q, k, v, pos, table = (x.detach() for x in case.inputs(torch.float32))
    call = deform_attn_call(q, k, v, pos, table, case.grid_size, 0.5, 0.0, False)
    bias, forward = call.cached(_forward_launch)
    with poisoned_memory():
        taps, packed = bias.make(pos, table)
    taps = taps[forward.tile].transpose(3, 4).flatten(2, 3)
    half = torch.tensor([call.axis_y.half, call.axis_x.half])
    assert_close(taps[:, :, :300], (1 - pos) * half)
    assert (taps[:, :, 300:, 1] == -1e30).all()
    assert packed.isfinite().all()


def identity_values(case):
    """Inputs whose output is the matrix of attention weights itself."""
    q, k, v, pos, table = draw_inputs(case, torch.float32)
    with torch.no_grad():
        v.copy_(torch.eye(case.keys).expand_as(v))
    return q, k, v, pos, table


def test_dropout_is_the_same_in_forward_and_backward():
    case = dataclasses.replace(CASE, keys=16, kv_heads=1, batch=1)
    inputs = identity_values(case)
    options = dict(grid_size=case.grid_size, scale=0.25)
    kernel = dict(seed=11, dropout_p=0.4, pos_in_range=False, **options)
    out, lse = deform_attn_forward(*inputs, **kernel)
    keep = (out != 0).float() / 0.6

    weights = naive.deform_attn(*inputs, **options, dropout_p=0.0)
    expected = torch.einsum(
        'bhns,bhsd->bhnd', weights * keep, inputs[2].expand(-1, 4, -1, -1)
    )
    assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert 0.35 < (out == 0).float().mean() < 0.45

    # The values are the identity only in forward: their gradient is linear anyway.
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(
        _dropped_attention(inputs, keep, options), inputs, grad_out
    )
    actual = deform_attn_backward(grad_out, out, lse, *inputs, **kernel)
    for a, w in zip(actual, wanted, strict=True):
        assert_close(a, w, rtol=1e-3, atol=1e-4)

    other, _ = deform_attn_forward(*inputs, **{**kernel, 'seed': 12})
    assert ((other == 0) != (out == 0)).float().mean() > 0.3


def _dropped_attention(inputs, keep, options):
    """naive attention, its weights times a given mask."""
    q, k, v, pos, table = inputs
    eye = torch.eye(v.shape[2]).expand_as(v)
    weights = naive.deform_attn(q, k, eye, pos, table, **options, dropout_p=0.0)
    values = repeat_kv(v, q.shape[1])
    return torch.einsum('bhns,bhsd->bhnd', weights * keep, values)


def test_log_sum_exp():
    inputs = draw_inputs(CASE, torch.float32)
    _, lse = deform_attn_forward(
        *inputs,
        seed=0,
        grid_size=CASE.grid_size,
        scale=0.3,
        dropout_p=0.0,
        pos_in_range=False,
    )
    q, k, _, pos, table = inputs
    logits = torch.einsum('bhnd,bhsd->bhns', q, repeat_kv(k, 4)) * 0.3
    logits = logits + naive.interpolated_bias(pos, table, CASE.grid_size)
    assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_opcheck():
    case = dataclasses.replace(CASE, batch=1, heads=2, kv_heads=1, groups=1)
    options = torch.tensor(3), *case.grid_size, 0.3, 0.1, False, 'triton'
    torch.library.opcheck(deform_attn_op, (*draw_inputs(case, torch.float32), *options))


def test_double_precision_is_refused():
    with pytest.raises(ValueError, match='float64'):
        run(CASE, 'triton', draw_inputs(CASE, torch.float64))
