"""neighborhood_attn: its custom op, torch.compile and user errors."""

import pytest
import torch
from neighborhood_cases import assert_all_close, make_inputs, outputs_and_gradients

from deform_gqa.ops import neighborhood_attn
from deform_gqa.ops.neighborhood_attn.api import neighborhood_attn_op
from deform_gqa.ops.neighborhood_attn.tiled_halos import cut_axis


@pytest.mark.parametrize('rpb', [True, False])
def test_opcheck(rpb):
    inputs = make_inputs((6, 7), 3, batch=1, heads=2, kv_heads=1, dim=4, rpb=rpb)
    options = (6, 7, 0.5, 0.0, 3, 1, 'torch')
    torch.library.opcheck(neighborhood_attn_op, (*inputs, None, *options))


@pytest.mark.parametrize('dropout_p', [0.0, 0.2])
def test_compiles_without_graph_break(dropout_p):
    inputs = make_inputs((8, 9), 3)
    options = dict(grid_size=(8, 9), kernel_size=3, dropout_p=dropout_p)

    def run(*tensors):
        return neighborhood_attn(*tensors, **options).sin()

    compiled = torch.compile(run, backend='aot_eager', fullgraph=True)
    results = []
    for function in (run, compiled):
        torch.manual_seed(0)
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert_all_close(results[1], results[0])


def test_one_compilation_serves_changing_sizes():
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    compiled = torch.compile(
        neighborhood_attn, backend=count, fullgraph=True, dynamic=True
    )
    for grid_size in ((8, 9), (10, 13), (11, 8)):
        inputs = make_inputs(grid_size, 3)
        options = dict(grid_size=grid_size, kernel_size=3)
        expected = neighborhood_attn(*inputs, **options)
        torch.testing.assert_close(compiled(*inputs, **options), expected)
    assert compilations == 1


def test_training_after_inference_mode():
    """What is cached in inference mode serves autograd too."""
    cut_axis.cache_clear()
    inputs = make_inputs((8, 9), 3)
    options = dict(grid_size=(8, 9), kernel_size=3)
    with torch.inference_mode():
        neighborhood_attn(*inputs, **options)
    expected = outputs_and_gradients(inputs, **options, backend='naive')
    assert_all_close(outputs_and_gradients(inputs, **options), expected)


def _replace(index, change):
    def apply(inputs, options):
        inputs[index] = change(inputs[index])

    return apply


def _option(**changes):
    def apply(inputs, options):
        options.update(changes)

    return apply


@pytest.mark.parametrize(
    ('apply', 'error', 'message'),
    [
        (_replace(0, lambda q: q.tolist()), TypeError, 'q must be a torch.Tensor'),
        (_replace(0, lambda q: q[0]), ValueError, 'q must have shape'),
        (_replace(0, lambda q: q.long()), TypeError, 'q must be a floating'),
        (_replace(1, lambda k: k[..., :4]), ValueError, 'k must have shape'),
        (_replace(2, lambda v: v[:, :1]), ValueError, 'v must have shape'),
        (_replace(1, lambda k: k.float()), TypeError, 'k must have the dtype'),
        (_replace(2, lambda v: v.float()), TypeError, 'v must have the dtype'),
        (_replace(0, lambda q: q[:, :3]), ValueError, '3 query heads'),
        (_replace(0, lambda q: q[..., :0]), ValueError, 'q must have channels'),
        (_replace(3, lambda rpb: rpb[0]), ValueError, 'rpb must have shape'),
        (_replace(3, lambda rpb: rpb[:, :4]), ValueError, 'rpb must have shape'),
        (_replace(3, lambda rpb: rpb.long()), TypeError, 'rpb must be a floating'),
        (_option(grid_size=(8, 8)), ValueError, 'grid_size'),
        (_option(grid_size=(72,)), ValueError, 'grid_size must be'),
        (_option(dropout_p=1.0), ValueError, 'dropout_p must be in'),
        (_option(scale=float('inf')), ValueError, 'scale must be finite'),
        (_option(scale='a'), TypeError, "scale .* got 'a' of type str"),
        (_option(scale=torch.tensor(0.3)), TypeError, 'scale .* of type Tensor'),
        (_option(grid_size=72), TypeError, 'grid_size must be .* got 72'),
        (_option(grid_size=(8.0, 9.0)), TypeError, r'grid_size\[0\] .* got 8\.0'),
        (_option(kernel_size=3.0), TypeError, 'kernel_size .* got 3.0 of type float'),
        (_option(kernel_size=(3, 3)), TypeError, r'kernel_size .* got \(3, 3\)'),
        (_option(dilation=1.0), TypeError, 'dilation must be an integer, got 1.0'),
        (_option(kernel_size=4), ValueError, 'kernel_size must be odd'),
        (_option(kernel_size=1), ValueError, 'kernel_size must be odd'),
        (_option(dilation=0), ValueError, 'dilation must be at least 1'),
        (_option(dilation=3), ValueError, 'grid_size must be at least'),
        (_option(backend='cuda'), ValueError, 'backend must be one of'),
    ],
)
def test_user_errors(apply, error, message):
    inputs = [x.detach() for x in make_inputs((8, 9), 3)]
    options = dict(grid_size=(8, 9), kernel_size=3)
    apply(inputs, options)
    with pytest.raises(error, match=message):
        neighborhood_attn(*inputs, **options)


def test_key_map_of_another_size():
    q, k, v, rpb = make_inputs((8, 9), 3)
    with pytest.raises(ValueError, match='k and v must cover the map of q'):
        neighborhood_attn(
            q, k[:, :, 1:], v[:, :, 1:], rpb, grid_size=(8, 9), kernel_size=3
        )
    with pytest.raises(ValueError, match='hold no keys'):
        neighborhood_attn(
            q, k[:, :, :0], v[:, :, :0], rpb, grid_size=(8, 9), kernel_size=3
        )


@pytest.mark.parametrize('name', ['k', 'v', 'rpb'])
def test_inputs_on_another_device(name):
    inputs = dict(zip('qkv', make_inputs((8, 9), 3)[:3], strict=True))
    inputs['rpb'] = torch.zeros(4, 5, 5, dtype=torch.float64)
    inputs[name] = inputs[name].detach().to('meta')
    with pytest.raises(ValueError, match=f'{name} must be on the device of q'):
        neighborhood_attn(**inputs, grid_size=(8, 9), kernel_size=3)
