import dataclasses

import pytest
import torch
from cases import DeformAttnCase, draw_inputs, output_and_gradients
from drawn_cases import deform_attn_cases
from hypothesis import given, settings
from torch.testing import assert_close

from deform_gqa.ops import deform_attn
from deform_gqa.ops.common.backends import NAIVE_WEIGHTS, choose_backend
from deform_gqa.ops.deform_attn import tiled as torch_impl
from deform_gqa.ops.deform_attn.api import deform_attn_op

CASE = DeformAttnCase(
    batch=2,
    heads=4,
    kv_heads=2,
    groups=2,
    grid_size=(5, 7),
    keys=6,
    head_dim=8,
    table_size=(9, 11),
    reach=1.3,
    strided=False,
    seed=0,
)

# Numerical differentiation calls the op twice for each input element.
TINY = dataclasses.replace(CASE, batch=1, grid_size=(3, 4), keys=3, head_dim=2)


def run(case, backend, dtype=torch.float64, inputs=None, **options):
    def op(*tensors):
        return deform_attn(
            *tensors, grid_size=case.grid_size, backend=backend, **options
        )

    return output_and_gradients(op, case.inputs(dtype) if inputs is None else inputs)


@settings(max_examples=120, deadline=None)
@given(deform_attn_cases())
def test_torch_equals_naive(case):
    for actual, expected in zip(run(case, 'torch'), run(case, 'naive'), strict=True):
        assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('tile', [(1, 3), (4, 4), (16, 64)])
@pytest.mark.parametrize('max_weights', [1, 500, 2**21])
def test_tile_shape_does_not_matter(monkeypatch, tile, max_weights):
    expected = run(CASE, 'naive')
    monkeypatch.setattr(torch_impl, 'TILE_ROWS', tile[0])
    monkeypatch.setattr(torch_impl, 'TILE_COLS', tile[1])
    monkeypatch.setattr(torch_impl, 'MAX_WEIGHTS', max_weights)
    for actual, wanted in zip(run(CASE, 'torch'), expected, strict=True):
        assert_close(actual, wanted, rtol=1e-7, atol=1e-9)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(deform_attn_cases())
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype, case):
    """At most twice the error that naive makes in the same precision."""
    low = draw_inputs(case, dtype)
    exact_inputs = [
        None if x is None else x.detach().double().requires_grad_() for x in low
    ]
    exact = run(case, 'naive', inputs=exact_inputs)
    naive = run(case, 'naive', inputs=low)
    actual = run(case, 'torch', inputs=low)
    # Of a single key the gradients of q and k vanish: what is left of them is rounding,
    # which naive has none of, summed over all queries.
    atol = {torch.float32: 3e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for a, n, e in zip(actual, naive, exact, strict=True):
        error = (a.double() - e).abs().max()
        allowed = 2 * (n.double() - e).abs().max() + atol * e.abs().max().clamp(min=1)
        assert error <= allowed


def test_gradcheck():
    inputs = TINY.inputs()
    # Away from table cells' borders, where bilinear interpolation has no derivative.
    with torch.no_grad():
        inputs[3].copy_(
            torch.linspace(-1.13, 0.97, inputs[3].numel()).view_as(inputs[3])
        )
    torch.autograd.gradcheck(
        lambda *t: deform_attn(*t, grid_size=TINY.grid_size, backend='torch'), inputs
    )


@pytest.mark.parametrize('biased', [True, False])
def test_gradcheck_with_dropout(biased):
    inputs = TINY.inputs()

    def op(*tensors):
        torch.manual_seed(3)
        return deform_attn(
            *tensors, grid_size=TINY.grid_size, dropout_p=0.4, backend='torch'
        )

    bias = [x.detach() for x in inputs[3:]] if biased else []
    torch.autograd.gradcheck(op, inputs[:3] + bias)


@pytest.mark.parametrize('biased', [True, False])
@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_dropout_expectation(backend, biased):
    q, k, v, pos, table = (x.detach().float() for x in CASE.inputs())
    pos, table = (pos, table) if biased else (None, None)
    options = dict(grid_size=CASE.grid_size, backend=backend)
    torch.manual_seed(0)
    expected = deform_attn(q, k, v, pos, table, **options)
    mean = (
        sum(
            deform_attn(q, k, v, pos, table, dropout_p=0.3, **options)
            for _ in range(600)
        )
        / 600
    )
    assert_close(mean, expected, rtol=0, atol=0.25)
    torch.manual_seed(5)
    first = deform_attn(q, k, v, pos, table, dropout_p=0.3, **options)
    torch.manual_seed(5)
    again = deform_attn(q, k, v, pos, table, dropout_p=0.3, **options)
    assert torch.equal(first, again)


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_grouped_heads_equal_repeated_kv(backend):
    q, k, v, pos, table = CASE.inputs()
    grouped = run(CASE, backend, inputs=[q, k, v, pos, table])
    k_all, v_all = (x.repeat_interleave(2, dim=1) for x in (k, v))
    repeated = run(CASE, backend, inputs=[q, k_all, v_all, pos, table])
    grouped_k, grouped_v = grouped[2:4]
    assert_close(grouped[0], repeated[0])
    assert_close(grouped_k, repeated[2].unflatten(1, (2, 2)).sum(2))
    assert_close(grouped_v, repeated[3].unflatten(1, (2, 2)).sum(2))


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_positions_far_outside_read_zeros(backend):
    q, k, v, pos, table = (x.detach() for x in CASE.inputs())
    biased = deform_attn(
        q, k, v, pos * 0 + 9, table, grid_size=CASE.grid_size, backend=backend
    )
    plain = deform_attn(q, k, v, grid_size=CASE.grid_size, backend=backend)
    assert_close(biased, plain)


@pytest.mark.parametrize('table_size', [CASE.table_size, None])
def test_every_output_is_written(poisoned_memory, table_size):
    case = dataclasses.replace(CASE, table_size=table_size)
    for x in run(case, 'torch', dropout_p=0.3):  # without a bias it runs in tiles too
        assert x.isfinite().all()


def test_writing_nothing_is_seen(poisoned_memory, monkeypatch):
    monkeypatch.setattr(torch_impl, '_paste', lambda *args: None)
    assert run(CASE, 'torch')[0].isnan().all()


@pytest.mark.parametrize('axes', [[0], [1], [0, 1]])
def test_positions_that_are_no_number_read_zeros(axes):
    """In the torch backend, and no gradient is spoilt by them."""
    outside, nowhere = CASE.inputs(), CASE.inputs()
    with torch.no_grad():
        outside[3][:, :, 2] = 9
        nowhere[3][:, :, 2, axes] = float('nan')
    actual = run(CASE, 'torch', inputs=nowhere)
    for a, e in zip(actual, run(CASE, 'naive', inputs=outside), strict=True):
        assert_close(a, e, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('dropout_p', [0.0, 0.3])
def test_last_stride_of_another_size_without_a_bias(dropout_p):
    """As 1x1 convolutions give q, k and v: torch's fused attention refuses it."""
    inputs = dataclasses.replace(CASE, table_size=None).inputs()
    transposed = [
        x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
        for x in inputs[:3]
    ]
    results = []
    for qkv in (inputs[:3], transposed):
        torch.manual_seed(0)
        results.append(
            run(CASE, 'torch', inputs=[*qkv, None, None], dropout_p=dropout_p)
        )
    for a, e in zip(*results, strict=True):
        assert_close(a, e)


def test_seed_of_dropout_is_on_the_cpu():
    """Whatever device tensors are made on by default."""
    inputs = [x.detach() for x in CASE.inputs()]
    options = dict(grid_size=CASE.grid_size, dropout_p=0.3, backend='torch')
    torch.manual_seed(0)
    expected = deform_attn(*inputs, **options)
    torch.manual_seed(0)
    with torch.device('meta'):
        assert torch.equal(deform_attn(*inputs, **options), expected)


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_empty_batch(backend):
    inputs = [x.detach()[:0].requires_grad_() for x in CASE.inputs()[:4]]
    inputs.append(CASE.inputs()[4])
    out, *grads = run(CASE, backend, inputs=inputs)
    assert out.shape == inputs[0].shape
    assert not grads[-1].any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('changes', [{}, {'table_size': None}, {'batch': 0}])
def test_opcheck(dtype, changes):
    inputs = dataclasses.replace(CASE, **changes).inputs(dtype)
    options = (*CASE.grid_size, 0.3, 0.0, False, 'torch')
    torch.library.opcheck(deform_attn_op, (*inputs, None, *options))


def test_compiles_without_graph_break():
    q, k, v, pos, table = CASE.inputs(torch.float32)
    compiled = torch.compile(deform_attn, fullgraph=True, backend='aot_eager')
    options = dict(grid_size=CASE.grid_size, backend='torch')
    actual = compiled(q, k, v, pos, table, **options)
    assert_close(actual, deform_attn(q, k, v, pos, table, **options))
    torch.autograd.grad(actual.sum(), (q, k, v, pos, table))


def test_double_backward_raises():
    inputs = CASE.inputs()
    out = deform_attn(*inputs, grid_size=CASE.grid_size, backend='torch')
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated twice'):
        grad.sum().backward()


def test_second_derivatives_are_never_zero():
    """Also where torch would take what is not in the graph to be constant."""
    inputs = CASE.inputs()
    q = inputs[0]
    options = dict(grid_size=CASE.grid_size, backend='torch')
    out = deform_attn(*inputs, **options)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated twice'):
        torch.autograd.grad(grad.sum(), q, allow_unused=True)

    def of_queries(q):
        return deform_attn(q, *inputs[1:], **options)

    # From the gradient's derivative by the gradient of the output
    with pytest.raises(RuntimeError, match='differentiated twice'):
        torch.autograd.functional.jvp(of_queries, (q,), (torch.ones_like(q),))


@pytest.mark.parametrize('requires_grad', [True, False])
def test_forward_mode_derivatives_are_never_zero(requires_grad):
    inputs = [x.detach().requires_grad_(requires_grad) for x in CASE.inputs()]

    def of_queries(q):
        options = dict(grid_size=CASE.grid_size, backend='torch')
        return deform_attn(q, *inputs[1:], **options)

    tangent = torch.ones_like(inputs[0])
    with pytest.raises(NotImplementedError, match='deform_attn has no forward-mode'):
        torch.func.jvp(of_queries, (inputs[0].detach(),), (tangent,))


def test_lse_has_no_gradient():
    inputs = CASE.inputs()
    options = (*CASE.grid_size, 0.3, 0.0, False, 'torch')
    out, lse = deform_attn_op(*inputs, None, *options)
    assert out.requires_grad and not lse.requires_grad


def test_deterministic():
    first, again = run(CASE, 'torch'), run(CASE, 'torch')
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


PARAMETER = torch.nn.Parameter(torch.tensor(0.3))


def change(index, value):
    inputs = CASE.inputs()
    inputs[index] = value(inputs[index]) if callable(value) else value
    return inputs


@pytest.mark.parametrize(
    ('inputs', 'options', 'error', 'message'),
    [
        (change(0, None), {}, TypeError, 'q must be a torch.Tensor, got NoneType'),
        (change(0, lambda q: q[0]), {}, ValueError, r'q must have shape \(B, Hq'),
        (change(0, lambda q: q.int()), {}, TypeError, 'q must be a floating'),
        (change(1, lambda k: k[:1]), {}, ValueError, 'k must have shape'),
        (change(2, lambda v: v[..., :3]), {}, ValueError, 'v must have shape'),
        (change(1, lambda k: k.float()), {}, TypeError, 'k must have the dtype of q'),
        (change(3, None), {}, ValueError, 'pos must be given'),
        (change(3, lambda p: p[..., :1]), {}, ValueError, 'pos must have shape'),
        (change(3, lambda p: p[:, :, :4]), {}, ValueError, 'got 4'),
        (change(3, lambda p: p.float()), {}, TypeError, 'pos must be torch.float64'),
        (change(3, lambda p: p[:, [0, 1, 1]]), {}, ValueError, 'offset groups, got 3'),
        (change(4, lambda t: t[:3]), {}, ValueError, 'rpb_table must have shape'),
        (change(4, lambda t: t[:, :0]), {}, ValueError, 'rpb_table must have shape'),
        (CASE.inputs(), {'grid_size': (5, 6)}, ValueError, r'grid_size \(5, 6\)'),
        (CASE.inputs(), {'grid_size': (35,)}, ValueError, 'grid_size must be'),
        (CASE.inputs(), {'grid_size': 35}, TypeError, 'grid_size .* got 35 of type'),
        (CASE.inputs(), {'grid_size': None}, TypeError, 'grid_size .* got None'),
        (CASE.inputs(), {'grid_size': (5.0, 7)}, TypeError, r'grid_size\[0\] .* 5\.0'),
        (CASE.inputs(), {'grid_size': (5, '7')}, TypeError, r"grid_size\[1\] .* '7'"),
        (CASE.inputs(), {'dropout_p': 1.0}, ValueError, 'dropout_p .* got 1.0'),
        (CASE.inputs(), {'dropout_p': '0'}, TypeError, "dropout_p .* got '0' of type"),
        (CASE.inputs(), {'scale': float('nan')}, ValueError, 'scale .* got nan'),
        (CASE.inputs(), {'scale': 'a'}, TypeError, "scale .* got 'a' of type str"),
        (CASE.inputs(), {'scale': PARAMETER}, TypeError, 'scale must .* got Parameter'),
        (CASE.inputs(), {'pos_in_range': 'no'}, TypeError, "a bool, got 'no' of"),
        (CASE.inputs(), {'backend': 'cuda'}, ValueError, "got 'cuda'"),
        (CASE.inputs(), {'backend': 'triton'}, ValueError, "'triton' cannot run"),
    ],
)
def test_bad_input(inputs, options, error, message):
    options = {'grid_size': CASE.grid_size, **options}
    with pytest.raises(error, match=message):
        deform_attn(*inputs, **options)


def test_heads_no_multiple_of_kv_heads():
    q, k, v, _, _ = CASE.inputs()
    k, v = (x[:, [0, 1, 1]] for x in (k, v))
    with pytest.raises(ValueError, match='kv heads, got 3'):
        deform_attn(q, k, v, grid_size=CASE.grid_size)


@pytest.mark.parametrize(
    ('pos', 'error', 'message'),
    [
        ('nonsense', TypeError, 'pos must be a torch.Tensor, got str'),
        (torch.zeros(3), ValueError, r'pos must have shape .* got \(3,\)'),
        (torch.zeros(2, 1, 6, 2), TypeError, 'pos must be torch.float64'),
        (torch.zeros(2, 1, 5, 2).double(), ValueError, 'of the 6 keys, got 5'),
        (torch.zeros(2, 3, 6, 2).double(), ValueError, 'offset groups, got 3'),
        (torch.zeros(2, 1, 6, 2, device='meta').double(), ValueError, 'pos must be on'),
    ],
)
def test_positions_are_checked_without_a_table_too(pos, error, message):
    q, k, v, _, _ = CASE.inputs()
    with pytest.raises(error, match=message):
        deform_attn(q, k, v, pos, grid_size=CASE.grid_size)


def test_no_channels():
    q, k, v, _, _ = (x.detach()[..., :0] for x in CASE.inputs())
    with pytest.raises(
        ValueError, match=r'q must have channels .* got \(2, 4, 35, 0\)'
    ):
        deform_attn(q, k, v, grid_size=CASE.grid_size)


def test_no_query_heads():
    q, k, v, _, _ = CASE.inputs()
    with pytest.raises(ValueError, match=r'the 0 query heads .* got 2'):
        deform_attn(q[:, :0], k, v, grid_size=CASE.grid_size)


def test_no_keys():
    q, k, v, _, _ = CASE.inputs()
    with pytest.raises(ValueError, match='no keys'):
        deform_attn(q, k[:, :, :0], v[:, :, :0], grid_size=CASE.grid_size)


class TestAutomaticBackendOnCPU:
    @pytest.mark.parametrize('with_grad', [True, False])
    def test_materialises_few_weights_only(self, with_grad):
        cpu = dict(device=torch.device('cpu'), dtype=torch.float32, head_dim=32)
        most = NAIVE_WEIGHTS[with_grad]
        with torch.set_grad_enabled(with_grad):
            assert choose_backend('deform_attn', 'auto', weights=most, **cpu) == 'naive'
            larger = choose_backend('deform_attn', 'auto', weights=most + 1, **cpu)
            assert larger == 'torch'
            assert choose_backend('deform_sdpa', 'auto', **cpu) == 'torch'

    def test_a_named_backend_stays(self):
        cpu = dict(device=torch.device('cpu'), dtype=torch.float32, head_dim=32)
        assert choose_backend('deform_attn', 'torch', weights=1, **cpu) == 'torch'
