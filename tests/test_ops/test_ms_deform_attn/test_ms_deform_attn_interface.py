"""ms_deform_attn: its custom op, torch.compile, FLOPs and user errors."""

import pytest
import torch
from ms_deform_cases import MsDeformCase
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from deform_gqa.ops import ms_deform_attn
from deform_gqa.ops.ms_deform_attn import flops as flops
from deform_gqa.ops.ms_deform_attn.api import ms_deform_attn_op

CASE = MsDeformCase()


def arguments(case=CASE, dtype=torch.float64, **changes):
    value, locations, weights = (x.detach() for x in case.inputs(dtype))
    shapes = torch.tensor(case.shapes)
    sizes = shapes.prod(1)
    named = dict(
        value=value,
        spatial_shapes=shapes,
        level_start_index=sizes.cumsum(0) - sizes,
        sampling_locations=locations,
        attention_weights=weights,
    )
    return named | changes


@pytest.mark.parametrize('logits', [False, True])
def test_opcheck(logits):
    tensors = list(arguments().values())
    for i in (0, 3, 4):
        tensors[i].requires_grad_()
    torch.library.opcheck(ms_deform_attn_op, (*tensors, logits, 'torch'))


@pytest.mark.parametrize('as_list', [False, True])
def test_one_graph_for_all_sizes(as_list):
    """Forward and backward, without a break."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        ms_deform_attn, backend=count, fullgraph=True, dynamic=True
    )
    for queries, shapes in ((5, ((5, 7), (3, 4))), (9, ((8, 3), (2, 6)))):
        case = MsDeformCase(queries=queries, shapes=shapes)
        call = arguments(case)
        if as_list:
            call |= dict(spatial_shapes=list(shapes), level_start_index=None)
        for name in ('value', 'sampling_locations', 'attention_weights'):
            call[name].requires_grad_()
        results = []
        for function in (ms_deform_attn, compiled):
            out = function(**call)
            inputs = [x for x in call.values() if getattr(x, 'requires_grad', False)]
            results.append([out, *torch.autograd.grad(out.sum(), inputs)])
        assert_close(*results)
    assert len(graphs) == 1


def test_levels_as_tensor_list_or_nothing():
    expected = ms_deform_attn(**arguments())
    for shapes in (torch.tensor(CASE.shapes).int(), CASE.shapes, [[5, 7], [3, 4]]):
        for starts in (None, [0, 35], torch.tensor([0, 35]).int()):
            levels = dict(spatial_shapes=shapes, level_start_index=starts)
            assert torch.equal(ms_deform_attn(**arguments(**levels)), expected)


def test_autocast_changes_nothing():
    call = arguments(dtype=torch.float32)
    expected = ms_deform_attn(**call)
    for backend in ('naive', 'torch'):
        with torch.autocast('cpu', torch.bfloat16):
            out = ms_deform_attn(**call, backend=backend)
        assert out.dtype == torch.float32
        assert_close(out, expected)


def test_second_derivative_is_an_error():
    call = arguments()
    call['value'].requires_grad_()
    out = ms_deform_attn(**call)
    (grad,) = torch.autograd.grad(out.square().sum(), call['value'], create_graph=True)
    with pytest.raises(RuntimeError, match='ms_deform_attn cannot be differentiated'):
        grad.sum().backward()


def test_flops():
    call = arguments()
    call['value'].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = ms_deform_attn(**call)
        samples = CASE.batch * CASE.queries * CASE.heads * 2 * CASE.points
        forward = 2 * 4 * samples * CASE.dim
        assert counter.get_total_flops() == forward
        out.sum().backward()
    assert counter.get_total_flops() == 3 * forward


LOCATIONS, WEIGHTS = 'sampling_locations', 'attention_weights'


@pytest.mark.parametrize(
    ('name', 'change', 'error', 'message'),
    [
        ('value', lambda x: x.tolist(), TypeError, 'value must be a torch.Tensor'),
        ('value', lambda x: x[0], ValueError, 'value must have shape'),
        ('value', lambda x: x.long(), TypeError, 'value must be a floating'),
        ('value', lambda x: x[..., :0], ValueError, 'value must have channels'),
        ('value', lambda x: x[:, 1:], ValueError, 'hold 47 keys, value holds 46'),
        ('value', lambda x: x[:, :, :3], ValueError, r'the 4 heads .* got 3'),
        ('value', lambda x: x[:, :, :0], ValueError, r'the 4 heads .* got 0'),
        ('value', lambda x: x.float(), TypeError, r'sampling_locations must be .*32'),
        ('spatial_shapes', lambda x: 7, TypeError, 'spatial_shapes .* got int'),
        ('spatial_shapes', lambda x: [5, 7], ValueError, r'spatial_shapes\[0\] .* 5'),
        ('spatial_shapes', lambda x: [(5,)], ValueError, r'spatial_shapes\[0\] must'),
        ('spatial_shapes', lambda x: [(5, 7.0)], TypeError, r'\[0\] .* got 7\.0'),
        ('spatial_shapes', lambda x: x.double(), TypeError, 'spatial_shapes must hold'),
        ('spatial_shapes', lambda x: x[0], ValueError, 'spatial_shapes must have'),
        ('spatial_shapes', lambda x: x[:1], ValueError, 'level_start_index must have'),
        ('spatial_shapes', lambda x: -x, ValueError, 'not be negative'),
        ('spatial_shapes', lambda x: [(-5, 7), (3, 4)], ValueError, r'got \(-5, 7\)'),
        ('spatial_shapes', lambda x: [(5, 7), (3, 5)], ValueError, 'hold 50 keys'),
        ('spatial_shapes', lambda x: [(5, 7), (3, 3)], ValueError, 'hold 44 keys'),
        ('level_start_index', lambda x: 7, TypeError, 'level_start_index .* got int'),
        ('level_start_index', lambda x: [0, 3.0], TypeError, 'must be an integer'),
        ('level_start_index', lambda x: x.double(), TypeError, 'index must hold int'),
        ('level_start_index', lambda x: x[:1], ValueError, r'must have shape \(L,\)'),
        ('level_start_index', lambda x: x + 1, ValueError, 'must add up the sizes'),
        (LOCATIONS, lambda x: x[0], ValueError, 'sampling_locations must have shape'),
        (LOCATIONS, lambda x: x[..., :1], ValueError, 'sampling_locations must have'),
        (LOCATIONS, lambda x: x[:, :, :, :1], ValueError, 'sampling_locations must'),
        (LOCATIONS, lambda x: x[:1], ValueError, 'sampling_locations must have shape'),
        (LOCATIONS, lambda x: x.bfloat16(), TypeError, 'got torch.bfloat16'),
        (WEIGHTS, lambda x: x[0], ValueError, 'attention_weights must have shape'),
        (WEIGHTS, lambda x: x[:, 1:], ValueError, 'attention_weights must have shape'),
        (WEIGHTS, lambda x: x.half(), TypeError, 'attention_weights .* torch.float16'),
        (WEIGHTS, lambda x: x.to('meta'), ValueError, 'attention_weights must be on'),
        (
            LOCATIONS,
            lambda x: x.to('meta'),
            ValueError,
            'sampling_locations must be on',
        ),
    ],
)
def test_bad_input(name, change, error, message):
    call = arguments()
    call[name] = change(call[name])
    with pytest.raises(error, match=message):
        ms_deform_attn(**call)


@pytest.mark.parametrize('points', [0, 3])
def test_no_samples(points):
    """Neither levels without points nor points without levels."""
    call = arguments(MsDeformCase(points=points))
    if points:
        call['spatial_shapes'] = call['spatial_shapes'][:0]
        call['level_start_index'] = call['level_start_index'][:0]
        call['value'] = call['value'][:, :0]
        for name in (LOCATIONS, WEIGHTS):
            call[name] = call[name][:, :, :, :0]
    with pytest.raises(ValueError, match='must have levels and points'):
        ms_deform_attn(**call)
    with pytest.raises(ValueError, match='sampling_locations must have'):
        ms_deform_attn(**call | dict(spatial_shapes=[], level_start_index=None))


def test_no_heads():
    with pytest.raises(ValueError, match='the 0 heads of sampling_locations must be'):
        ms_deform_attn(**arguments(MsDeformCase(heads=0)))


@pytest.mark.parametrize(
    ('option', 'error', 'message'),
    [
        (dict(logits=1), TypeError, 'logits must be True or False, got 1'),
        (dict(backend='cuda'), ValueError, 'backend must be one of'),
        (dict(backend='triton'), ValueError, "backend 'triton' cannot run"),
    ],
)
def test_bad_options(option, error, message):
    with pytest.raises(error, match=message):
        ms_deform_attn(**arguments(), **option)


def test_wrong_levels_in_a_compiled_graph():
    """There they are read when it runs."""
    compiled = torch.compile(ms_deform_attn, backend='aot_eager', fullgraph=True)
    call = arguments(spatial_shapes=torch.tensor([(5, 7), (3, 5)]))
    with pytest.raises(ValueError, match='hold 50 keys, value holds 47'):
        compiled(**call)
