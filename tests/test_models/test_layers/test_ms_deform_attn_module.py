"""MSDeformAttn beside mmcv's MultiScaleDeformableAttention with the same weights."""

import math

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from torch.testing import assert_close

from deform_gqa.models import MSDeformAttn

SHAPES = ((5, 7), (3, 4))
SMALL = dict(embed_dims=32, num_heads=4, num_levels=2, num_points=3)


def make(cls=MSDeformAttn, seed=0, **options):
    """With weights that make every output depend on every input."""
    module = cls(**SMALL | options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return module.eval()


def call(numbers=2, batch_first=False, queries=6, seed=1, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        x = torch.randn(shape, generator=generator)
        return x if batch_first else x.transpose(0, 1)

    keys = sum(height * width for height, width in shapes)
    reference = torch.rand(2, queries, 2, numbers, generator=generator)
    return dict(
        query=normal(2, queries, 32),
        value=normal(2, keys, 32),
        identity=normal(2, queries, 32),
        query_pos=normal(2, queries, 32),
        key_padding_mask=torch.rand(2, keys, generator=generator) < 0.2,
        reference_points=reference,
        spatial_shapes=torch.tensor(shapes),
        level_start_index=torch.tensor([0, math.prod(shapes[0])]),
    )


def in_double(inputs):
    return {
        name: x.double() if x.is_floating_point() else x for name, x in inputs.items()
    }


def outputs_and_gradients(module, inputs):
    out = module(**inputs)
    out.square().sum().backward()
    return [out, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize('ratio', [1.0, 0.5])
@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('numbers', [2, 4])
def test_equals_mmcv(numbers, batch_first, ratio):
    options = dict(batch_first=batch_first, value_proj_ratio=ratio)
    theirs = make(MultiScaleDeformableAttention, **options)
    ours = make(seed=3, **options)
    ours.load_state_dict(theirs.state_dict())
    inputs = call(numbers, batch_first)
    expected = outputs_and_gradients(theirs, inputs)
    for a, e in zip(outputs_and_gradients(ours, inputs), expected, strict=True):
        assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


def test_query_serves_as_value_and_identity():
    theirs, ours = make(MultiScaleDeformableAttention), make()
    inputs = call(queries=47)
    for name in ('value', 'identity', 'query_pos', 'key_padding_mask'):
        del inputs[name]
    assert_close(ours(**inputs), theirs(**inputs), rtol=1e-5, atol=1e-5)


def test_the_older_name_of_identity():
    """mmcv's module still takes it, and warns."""
    inputs = call()
    expected = make()(**inputs)
    inputs['residual'] = inputs.pop('identity')
    assert torch.equal(make()(**inputs), expected)


def test_reference_points_that_are_repeated():
    inputs = call()
    for dim in range(3):
        points = inputs['reference_points'].narrow(dim, 0, 1)
        narrow = make()(**inputs | dict(reference_points=points))
        points = points.expand_as(inputs['reference_points'])
        assert torch.equal(narrow, make()(**inputs | dict(reference_points=points)))


def test_the_backend_is_passed_on():
    with pytest.raises(ValueError, match="'triton' cannot run ms_deform_attn"):
        make(backend='triton').double()(**in_double(call()))


def test_levels_as_a_list():
    module, inputs = make(), call()
    expected = module(**inputs)
    inputs |= dict(spatial_shapes=list(SHAPES), level_start_index=None)
    assert torch.equal(module(**inputs), expected)


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_an_empty_level(backend):
    """It adds nothing, and no gradient becomes nan."""
    module, inputs = make(backend=backend), call(shapes=(SHAPES[0], (0, 4)))
    out, *grads = outputs_and_gradients(module, inputs)
    assert all(x.isfinite().all() for x in (out, *grads))
    weight = module.sampling_offsets.weight.grad.view(4, 2, 3, 2, 32)
    assert weight[:, 0].all() and not weight[:, 1].any()


@pytest.mark.parametrize('numbers', [2, 4])
def test_one_graph_for_all_sizes(numbers):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    module = make()
    compiled = torch.compile(module, backend=count, fullgraph=True, dynamic=True)
    for shapes, queries in ((SHAPES, 6), (((8, 3), (2, 6)), 9)):
        inputs = call(numbers, queries=queries, shapes=shapes)
        assert_close(compiled(**inputs), module(**inputs))
    assert len(graphs) == 1


def test_state_dict_and_initialisation_are_those_of_mmcv():
    states = []
    for cls in (MultiScaleDeformableAttention, MSDeformAttn):
        torch.manual_seed(0)
        states.append(cls().state_dict())
    assert list(states[0]) == list(states[1])
    for name, x in states[0].items():
        # value_proj and output_proj are drawn, in the same order
        assert_close(states[1][name], x, rtol=1e-6, atol=1e-6)


def test_fewer_value_heads():
    """Those of the values' projection are repeated in mmcv's module."""
    ours, theirs = make(num_value_heads=2), make(MultiScaleDeformableAttention)
    state = ours.state_dict()
    assert state['value_proj.weight'].shape == (16, 32)
    for name in ('value_proj.weight', 'value_proj.bias'):
        heads = state[name].unflatten(0, (2, 8))
        state[name] = heads.repeat_interleave(2, 0).flatten(0, 1)
    theirs.load_state_dict(state)
    inputs = call()
    assert_close(ours(**inputs), theirs(**inputs), rtol=1e-5, atol=1e-5)


def test_dropout_comes_before_the_identity():
    module = make(dropout=0.5).train()
    inputs = call()
    dropped = module(**inputs) - inputs['identity']
    assert 0.3 < (dropped == 0).float().mean() < 0.7


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_locations_are_float32_under_autocast(dtype):
    module, inputs = make(), call()
    name = 'deform_gqa.models.layers.ms_deform_attn.ms_deform_attn'
    seen = []

    def record(value, shapes, starts, locations, *args, **kwargs):
        seen.append((value.dtype, locations))
        return value.new_zeros(2, 6, 32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, record)
        module(**inputs)
        with torch.autocast('cpu', dtype):
            module(**inputs)
    (_, exact), (value_dtype, locations) = seen
    assert value_dtype == dtype and locations.dtype == torch.float32
    assert_close(locations, exact)


def test_training_under_autocast():
    module, inputs = make(), call()
    expected = module(**inputs)
    with torch.autocast('cpu', torch.bfloat16):
        out = module(**inputs)
    out.sum().backward()
    assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    assert all(x.grad.isfinite().all() for x in module.parameters())


def test_double_precision():
    assert make().double()(**in_double(call())).dtype == torch.float64


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(embed_dims=30), ValueError, r'embed_dims \(30\) must be a positive mult'),
        (dict(value_proj_ratio=0.3), ValueError, r'value channels \(9\) must be'),
        (dict(value_proj_ratio=0.01), ValueError, r'value channels \(0\) must be'),
        (dict(value_proj_ratio=-1), ValueError, 'value_proj_ratio .* positive, got -1'),
        (dict(value_proj_ratio=math.inf), ValueError, 'ratio .* positive, got inf'),
        (dict(value_proj_ratio='1'), TypeError, "ratio must be a number, got '1'"),
        (dict(num_value_heads=3), ValueError, r'num_heads \(4\) .* \(3\)'),
        (dict(num_points=0), ValueError, 'num_points must be at least 1, got 0'),
        (dict(num_levels=2.0), TypeError, 'num_levels must be an integer, got 2.0'),
        (dict(dropout=1.5), ValueError, 'dropout must be in'),
        (dict(backend='cuda'), ValueError, 'backend must be one of'),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        MODELS.build(dict(type='MSDeformAttn', **SMALL | options))


@pytest.mark.parametrize(
    ('name', 'change', 'error', 'message'),
    [
        ('reference_points', lambda x: None, TypeError, 'must be a tensor, got None'),
        ('reference_points', lambda x: x[0], ValueError, 'must have shape .*, 2, 2'),
        (
            'reference_points',
            lambda x: x[..., :1],
            ValueError,
            r'or 4 .* \(2, 6, 2, 1\)',
        ),
        (
            'reference_points',
            lambda x: x.repeat(1, 1, 2, 1),
            ValueError,
            r'\(B, N, L\) = \(2, 6, 2\), got \(2, 6, 4, 2\)',
        ),
        ('spatial_shapes', lambda x: None, TypeError, 'spatial_shapes .* got NoneType'),
        ('spatial_shapes', lambda x: x[:1], ValueError, r'levels \(2\) levels, got 1'),
    ],
)
def test_bad_input(name, change, error, message):
    inputs = call()
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=message):
        make()(**inputs)


def test_bad_reference_points():
    with pytest.raises(ValueError, match=r'2 or 4 numbers, got shape \(2, 6, 2, 3\)'):
        make()(**call(numbers=3))
