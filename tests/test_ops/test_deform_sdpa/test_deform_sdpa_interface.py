"""deform_sdpa: its custom op, torch.compile, memory and user errors."""

import pytest
import torch
from test_deform_sdpa import CASE, assert_all_close, run
from torch.testing import assert_close

from deform_gqa.ops import deform_sdpa
from deform_gqa.ops.deform_sdpa import tiled as torch_impl
from deform_gqa.ops.deform_sdpa.api import deform_sdpa_op


def test_opcheck():
    inputs = CASE.inputs(torch.float32)
    options = (*CASE.grid_size, 0.3, 0.0, 'torch')
    torch.library.opcheck(deform_sdpa_op, (*inputs, None, *options))


@pytest.mark.parametrize('dropout_p', [0.0, 0.2])
def test_compiles_without_graph_break(dropout_p):
    inputs = CASE.inputs()

    def op(*tensors):
        return deform_sdpa(
            *tensors, grid_size=CASE.grid_size, dropout_p=dropout_p
        ).sin()

    compiled = torch.compile(op, backend='aot_eager', fullgraph=True)
    results = []
    for function in (op, compiled):
        torch.manual_seed(0)
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert_all_close(results[1], results[0])


def test_autocast_does_not_reach_inside():
    inputs = [x.detach() for x in CASE.inputs(torch.float32)]
    expected = deform_sdpa(*inputs, grid_size=CASE.grid_size, backend='torch')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = deform_sdpa(*inputs, grid_size=CASE.grid_size, backend='torch')
    assert torch.equal(actual, expected)


def test_double_backward_raises():
    inputs = CASE.inputs()
    out = deform_sdpa(*inputs, grid_size=CASE.grid_size, backend='torch')
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated twice'):
        grad.sum().backward()


def test_deterministic():
    first, again = run(CASE, 'torch'), run(CASE, 'torch')
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ('method', 'points', 'head_dim', 'grid_size'),
    [
        ('gather', 16, 16, (6, 8)),
        ('gather', 64, 1, (6, 8)),
        ('dense', 16, 16, (6, 8)),
        ('dense', 64, 16, (2, 2)),  # far more taps than pixels
    ],
)
def test_chunks_bound_the_largest_tensor(
    monkeypatch, method, points, head_dim, grid_size
):
    """More queries and points make more chunks, not larger ones."""
    largest = 0
    chunks = torch_impl._Problem.chunks

    def spy(self, index, maps):
        nonlocal largest
        for chunk in chunks(self, index, maps):
            samples = chunk[2]
            sampled = samples.values.numel() if method == 'gather' else 0
            largest = max(largest, samples.index.numel(), sampled)
            yield chunk

    monkeypatch.setattr(torch_impl._Problem, 'chunks', spy)
    monkeypatch.setattr(torch_impl, 'choose_method', lambda *sizes: method)
    q = torch.randn(1, 1, 2, 3000, head_dim)
    k = torch.randn(1, 2, 2, grid_size[0] * grid_size[1], head_dim)
    coords = torch.rand(1, 1, 3000, 2, points, 2)
    deform_sdpa(q, k, k, coords, grid_size=grid_size, backend='torch')
    assert 0 < largest <= torch_impl.MAX_NUMBERS[method]


def change(index, value):
    inputs = CASE.inputs()
    inputs[index] = value(inputs[index]) if callable(value) else value
    return inputs


@pytest.mark.parametrize(
    ('inputs', 'options', 'error', 'message'),
    [
        (change(0, None), {}, TypeError, 'q must be a torch.Tensor, got NoneType'),
        (change(0, lambda q: q[0]), {}, ValueError, r'q must have shape \(B, Vq, Hq'),
        (change(0, lambda q: q.int()), {}, TypeError, 'q must be a floating'),
        (change(1, lambda k: k[0]), {}, ValueError, r'k must have shape \(B, V, Hkv'),
        (change(1, lambda k: k[:1]), {}, ValueError, 'k must have shape'),
        (change(2, lambda v: v[..., :3]), {}, ValueError, 'v must have shape'),
        (change(1, lambda k: k.float()), {}, TypeError, 'k must have the dtype of q'),
        (change(2, lambda v: v.float()), {}, TypeError, 'v must have the dtype of q'),
        (change(0, lambda q: q[:, :, :3]), {}, ValueError, 'the 3 query heads'),
        (change(0, lambda q: q[:, :, :0]), {}, ValueError, 'the 0 query heads'),
        (change(3, None), {}, TypeError, 'coords must be a torch.Tensor'),
        (change(3, lambda c: c[0, 0]), {}, ValueError, 'coords must have shape'),
        (change(3, lambda c: c[..., :1]), {}, ValueError, 'coords must have shape'),
        (change(3, lambda c: c[:, :1]), {}, ValueError, 'coords must have shape'),
        (change(3, lambda c: c[:, :, :, :, :1]), {}, ValueError, 'coords must have'),
        (change(3, lambda c: c[..., :0, :]), {}, ValueError, r'no points \(P == 0\)'),
        (change(3, lambda c: c.float()), {}, TypeError, 'coords must be torch.float64'),
        (change(3, lambda c: c[:, :, [0, 1, 1]]), {}, ValueError, 'groups, got 3'),
        (CASE.inputs(), {'grid_size': (5, 6)}, ValueError, r'\(5, 6\) does not hold'),
        (CASE.inputs(), {'grid_size': (35,)}, ValueError, 'grid_size must be'),
        (CASE.inputs(), {'dropout_p': 1.0}, ValueError, 'dropout_p .* got 1.0'),
        (CASE.inputs(), {'scale': float('nan')}, ValueError, 'scale .* got nan'),
        (CASE.inputs(), {'scale': 'a'}, TypeError, "scale .* got 'a' of type str"),
        (CASE.inputs(), {'grid_size': 35}, TypeError, 'grid_size .* got 35 of type'),
        (CASE.inputs(), {'grid_size': (5, 7.0)}, TypeError, r'grid_size\[1\] .* 7\.0'),
        (CASE.inputs(), {'backend': 'cuda'}, ValueError, "got 'cuda'"),
        (CASE.inputs(), {'backend': 'triton'}, ValueError, "'triton' cannot run"),
    ],
)
def test_bad_input(inputs, options, error, message):
    options = {'grid_size': CASE.grid_size, **options}
    with pytest.raises(error, match=message):
        deform_sdpa(*inputs, **options)


def test_no_views_or_channels():
    q, k, v, coords = CASE.inputs()
    with pytest.raises(ValueError, match='no views or channels'):
        deform_sdpa(
            q,
            k[:, :0],
            v[:, :0],
            coords[:, :, :, :, :0],
            grid_size=CASE.grid_size,
        )


@pytest.mark.parametrize('name', ['k', 'v', 'coords'])
def test_inputs_on_another_device(name):
    inputs = dict(zip(('q', 'k', 'v', 'coords'), CASE.inputs(), strict=True))
    inputs[name] = inputs[name].detach().to('meta')
    with pytest.raises(ValueError, match=f'{name} must be on the device of q'):
        deform_sdpa(**inputs, grid_size=CASE.grid_size)


def test_low_precision_takes_float32_coords():
    inputs = CASE.inputs(torch.bfloat16)
    out = deform_sdpa(*inputs, grid_size=CASE.grid_size)
    assert out.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r'coords must be torch\.float32'):
        deform_sdpa(*inputs[:3], inputs[3].bfloat16(), grid_size=CASE.grid_size)
    assert_close(out, deform_sdpa(*inputs, grid_size=CASE.grid_size, backend='torch'))
