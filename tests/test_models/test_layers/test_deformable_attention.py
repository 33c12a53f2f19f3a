"""The 1-D, 2-D and 3-D modules against the published one and a literal reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden import assert_close as assert_golden
from golden import load_golden, sub_dict
from mmdet.registry import MODELS
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from deform_gqa.models import (
    DAT,
    DeformableAttention1D,
    DeformableAttention2D,
    DeformableAttention3D,
)
from deform_gqa.models.layers import baked_bias, position_bias
from deform_gqa.models.layers.baked_bias import BakedBias
from deform_gqa.ops import deform_attn

FORMS = {
    1: DeformableAttention1D,
    2: DeformableAttention2D,
    3: DeformableAttention3D,
}
SMALL = dict(
    dim=32,
    dim_head=4,
    heads=4,
    num_groups=2,
    offset_groups=2,
    downsample_factor=2,
    offset_kernel_size=4,
)
SIZES = {1: (11,), 2: (6, 9), 3: (4, 5, 7)}
# Of offsets and displacements: which axis of the map a channel stands for.
ORDER = {1: (0,), 2: (1, 0), 3: (0, 1, 2)}


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def build(axes, **options):
    torch.manual_seed(0)
    module = FORMS[axes](**{**SMALL, **options}).double()
    with torch.no_grad():  # offsets that move samples by about a cell
        module.to_offsets[2].weight.mul_(4)
    return module


def multilinear(x, at):
    """x (C, *map) at a point in pixels, zero outside."""
    out = x.new_zeros(x.shape[0])
    corner = [math.floor(p) for p in at]
    for bits in range(2 ** len(corner)):
        cell = [c + (bits >> a & 1) for a, c in enumerate(corner)]
        if all(0 <= c < side for c, side in zip(cell, x.shape[1:], strict=True)):
            weight = 1.0
            for p, c in zip(at, cell, strict=True):
                weight = weight * (1 - (p - c).abs())
            out = out + weight * x[(slice(None), *cell)]
    return out


def positions(sides):
    """Of all cells, in the order of the map's axes: (N, A) from -1 to 1."""
    axes = [torch.arange(n).double() * 2 / max(n - 1, 1) - 1 for n in sides]
    return torch.cartesian_prod(*axes).view(-1, len(sides))


def literal(module, x):
    """Sample by sample, head by head; nothing is grouped, batched or in blocks."""
    axes, size = x.ndim - 2, x.shape[2:]
    groups, heads = module.offset_groups, module.heads
    q_map = module.to_q(x)
    out = []
    for image, q_image in zip(x, q_map, strict=True):
        sampled, key_pos = [], []
        for part, q_part in zip(
            image.chunk(groups), q_image.chunk(groups), strict=True
        ):
            conv, act, proj, tanh, _ = module.to_offsets
            offsets = tanh(proj(act(conv(q_part[None]))))[0]
            grid = offsets.shape[1:]
            shift = [None] * axes
            for channel, axis in enumerate(ORDER[axes]):
                shift[axis] = offsets[channel].flatten() * module.offset_scale[axis]
            cells = torch.cartesian_prod(*(torch.arange(n) for n in grid))
            at = cells.view(-1, axes) + torch.stack(shift, -1)
            steps = torch.tensor(grid).sub(1).clamp(min=1).double()
            pos = 2 * at / steps - 1
            pixel = ((pos + 1) * torch.tensor(size) - 1) / 2
            sampled.append(torch.stack([multilinear(part, p) for p in pixel], -1))
            key_pos.append(pos)
        sampled = torch.cat(sampled)[(None, ...) + (None,) * (axes - 1)]
        k, v = (proj(sampled).flatten(2)[0] for proj in (module.to_k, module.to_v))
        head_out = []
        for head in range(heads):
            group = head // (heads // groups)
            rows = slice(head * 4, head * 4 + 4)
            first = head // (heads // module.num_groups) * 4
            logits = q_image[rows].flatten(1).T @ k[first : first + 4] / 2
            shift = positions(size)[:, None] - key_pos[group]
            shift = shift[..., list(ORDER[axes])]
            hidden = shift.sign() * (shift.abs() + 1).log()
            for layer in module.rel_pos_bias.mlp:
                hidden = layer(hidden)
            logits = logits + hidden[..., head % (heads // groups)]
            head_out.append(logits.softmax(-1) @ v[first : first + 4].T)
        attended = torch.cat(head_out, -1).T.unflatten(1, size)
        out.append(module.to_out(attended[None])[0])
    return torch.stack(out)


@pytest.mark.parametrize(
    ('module_class', 'name'),
    [
        (DeformableAttention1D, 'deformable_attention_1d'),
        (DeformableAttention2D, 'deformable_gqa_groups2'),
        (DeformableAttention2D, 'deformable_gqa_groups8'),
        (DeformableAttention2D, 'deformable_gqa_mqa'),
        (DeformableAttention3D, 'deformable_attention_3d'),
    ],
)
def test_published(module_class, name):
    """The 3-D data were made with the axes of the sampling grid put right."""
    config, arrays = load_golden(name)
    del config['input']
    module = module_class(**config)
    state = sub_dict(arrays, 'state/')
    assert set(module.state_dict()) == set(state)
    module.load_state_dict(state)
    x = arrays['x'].clone().requires_grad_()
    y, vgrid = module(x, return_vgrid=True)
    assert_golden('y', y, arrays['y'])
    assert_golden('vgrid', vgrid, arrays['vgrid'])
    assert_close(module(x), y)
    loss = (y * arrays['gy']).sum() + (vgrid * arrays['gvgrid']).sum()
    loss.backward()
    assert_golden('grad_x', x.grad, arrays['grad_x'])
    expected = sub_dict(arrays, 'grad/')
    # A bias that all keys share changes no weight: its gradient is rounding noise.
    floor = 1e-2 * max(grad.abs().max().item() for grad in expected.values())
    for parameter, grad in expected.items():
        found = module.get_parameter(parameter).grad
        assert_golden(parameter, found, grad, floor)


@pytest.mark.parametrize('axes', FORMS)
def test_literal_reference(axes):
    module = build(axes)
    x = draw(2, 32, *SIZES[axes])
    ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = module(ours), literal(module, reference)
    assert_close(out, expected)
    grad_out = draw(*out.shape)
    parameters = list(module.parameters())
    found = torch.autograd.grad(out, [ours, *parameters], grad_out)
    wanted = torch.autograd.grad(expected, [reference, *parameters], grad_out)
    assert_close(found, wanted)


@pytest.mark.parametrize('axes', FORMS)
def test_transposed_maps_give_transposed_outputs(axes):
    """With filters that look the same from all sides, no axis is treated apart."""
    module = build(axes, num_groups=4)
    dims = tuple(range(2, 2 + axes))
    with torch.no_grad():
        conv, proj = module.to_offsets[0], module.to_offsets[2]
        conv.weight.copy_(conv.weight.mean(dims, keepdim=True).expand_as(conv.weight))
        proj.weight.copy_(proj.weight[:1].expand_as(proj.weight))
        first = module.rel_pos_bias.mlp[0][0].weight
        first.copy_(first[:, :1].expand_as(first))
    x = draw(1, 32, *SIZES[axes])
    swapped = (0, 1, *dims[::-1])
    assert_close(module(x.permute(swapped)), module(x).permute(swapped))


@pytest.mark.parametrize(
    ('axes', 'size'), [(1, (2,)), (2, (1, 1)), (2, (1, 7)), (2, (9, 1)), (3, (1, 2, 1))]
)
def test_smallest_maps(axes, size):
    options = dict(downsample_factor=1, offset_kernel_size=3)
    module = build(axes, **options if 1 in size else {})
    x = draw(2, 32, *size)
    assert_close(module(x), literal(module, x))


def test_state_dict_of_the_ancestor():
    """Names and shapes of version 0.0.20."""
    mlp = {
        f'rel_pos_bias.mlp.{name}.{kind}'
        for name in ('0.0', '1.0', '2')
        for kind in ('weight', 'bias')
    }
    others = {f'to_{name}.weight' for name in ('q', 'k', 'v', 'out')}
    others |= {'to_out.bias', 'to_offsets.0.weight', 'to_offsets.0.bias'}
    others |= mlp | {'to_offsets.2.weight'}
    assert set(build(1).state_dict()) == others
    state = build(3, downsample_factor=(1, 2, 2), offset_kernel_size=(3, 4, 4))
    state = state.state_dict()
    assert set(state) == others | {'to_offsets.4.scale'}
    assert state['to_offsets.4.scale'].tolist() == [1, 2, 2]
    assert state['to_offsets.0.weight'].shape == (8, 1, 3, 4, 4)


def test_kv_heads_default_to_all_where_the_ancestor_knows_none():
    for axes in (1, 3):
        assert FORMS[axes](dim=64).num_groups == 8
    assert DeformableAttention2D(dim=64).num_groups == 2


def test_vgrid():
    module = build(2)
    _, vgrid = module(draw(2, 32, 6, 9), return_vgrid=True)
    assert vgrid.shape == (2 * 2, 2, 3, 4)
    shift = (
        vgrid
        - torch.stack(
            torch.meshgrid(torch.arange(4), torch.arange(3), indexing='ij')
        ).mT
    )
    assert shift.abs().max() < 2
    assert build(1)(draw(2, 32, 6), return_vgrid=True)[1].shape == (4, 3)
    assert build(3)(draw(1, 32, 2, 4, 6), return_vgrid=True)[1].shape == (2, 3, 1, 2, 3)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else (out,)
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize('training', [True, False])
def test_hidden_layers_are_never_whole_in_memory(monkeypatch, training):
    module = build(2).train(training)
    x = draw(1, 32, 12, 20).requires_grad_(training)
    whole = 12 * 20 * 6 * 10 * 8  # N, S, hidden; of one offset group
    monkeypatch.setattr(position_bias, 'MAX_LOG_CPB_HIDDEN', whole // 20)
    with LargestTensor() as largest, torch.set_grad_enabled(training):
        out = module(x)
        if training:
            out.sum().backward()
    assert largest.numel < whole / 8


def test_blocks_do_not_show(monkeypatch):
    module, x = build(2), draw(2, 32, 6, 9)
    expected = module(x)
    monkeypatch.setattr(position_bias, 'MAX_LOG_CPB_HIDDEN', 1)
    assert_close(module(x), expected)


def test_dropout_in_training_only():
    module, x = build(2, dropout=0.5), draw(1, 32, 6, 6)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_positions_stay_float32_under_autocast():
    torch.manual_seed(0)
    module = DeformableAttention2D(**SMALL)
    x = draw(1, 32, 6, 9, dtype=torch.float32)
    offset_dtypes = []
    module.to_offsets[2].register_forward_hook(
        lambda module, args, out: offset_dtypes.append(out.dtype)
    )
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out, vgrid = module(x, return_vgrid=True)
    assert (out.dtype, vgrid.dtype) == (torch.bfloat16, torch.float32)
    assert offset_dtypes == [torch.float32]
    assert_close(out.float(), module(x), atol=2e-2, rtol=2e-2)


def test_in_a_stage():
    attention = dict(type='DeformableAttention2D', heads=2, dim_head=4)
    arch = dict(embed_dims=(8,) * 4, depths=(1,) * 4, num_heads=(2,) * 4)
    model = DAT(
        dict(arch, block_types=('D', 'X', 'X', 'X')), attention={'D': attention}
    )
    assert len(model(torch.rand(1, 3, 32, 64))) == 4


# The table


def baked(axes, resolution, map_size=None, **options):
    module = build(axes, **options).eval()
    return module, module.bake_position_bias(resolution, map_size)


@pytest.mark.parametrize('axes', [1, 2])
def test_error_of_the_table_falls_with_its_resolution(axes):
    errors = [baked(axes, resolution)[1].max_error for resolution in (9, 33, 129)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


@pytest.mark.parametrize(('axes', 'size'), [(1, (11,)), (2, (6, 9)), (2, (1, 7))])
def test_baked_bias_gives_the_same_output(axes, size):
    """The offsets are so small that no key lies beyond the edge."""
    options = dict(offset_scale=0.0, downsample_factor=1, offset_kernel_size=3)
    module = build(axes, **options).eval()
    x = draw(2, 32, *size)
    expected = module(x)
    report = module.bake_position_bias(65)
    assert isinstance(report, BakedBias)
    assert report.table.shape == (4, 65 if axes == 2 else 1, 65)
    out = module(x)
    assert not torch.equal(out, expected)
    # Logits that are off by e change a weight by a factor of at most exp(2 e).
    bound = math.expm1(2 * report.max_error) * 5
    assert_close(out, expected, atol=bound, rtol=0)


def test_error_counts_keys_beyond_the_edge():
    module, report = baked(2, 65)
    beyond = module.bake_position_bias(65, (8, 12)).max_error
    assert beyond > 2 * report.max_error
    # A key beyond the edge is read at the nearest displacement of the table, (-2, -2).
    corner = module.rel_pos_bias(torch.tensor([-2.0, -2.0]).double())
    further = module.rel_pos_bias(torch.tensor([-2 - 4 / 5, -2 - 4 / 3]).double())
    assert beyond >= (corner - further).abs().max() - 1e-6


@pytest.mark.parametrize('size', [(6, 9), (1, 9), (9, 1)])
def test_keys_beyond_the_edge_are_brought_to_it(size, monkeypatch):
    """Kernels that are promised positions from -1 to 1 check no bounds."""
    calls = []

    def spy(q, k, v, pos, table, **options):
        calls.append((pos.abs().max() <= 1, options['pos_in_range']))
        return deform_attn(q, k, v, pos, table, **options)

    monkeypatch.setattr(baked_bias, 'deform_attn', spy)
    options = dict(offset_scale=20.0, downsample_factor=1, offset_kernel_size=3)
    module, _ = baked(2, 9, **options)
    module(draw(2, 32, *size))
    [(in_range, promised)] = calls
    assert in_range or not promised
    assert promised == (1 not in size)


def test_table_is_dropped_with_the_weights_it_was_made_of():
    module, _ = baked(2, 33)
    assert 'baked_table' not in module.state_dict()
    x = draw(1, 32, 6, 6)
    approximate = module(x)
    exact = module.train().eval()(x)
    assert not torch.equal(approximate, exact)
    module.bake_position_bias(33)
    module.load_state_dict(module.state_dict())
    assert torch.equal(module(x), exact)


def test_baked_backends_agree():
    module, _ = baked(2, 33)
    x = draw(2, 32, 6, 9)
    outs = []
    for backend in ('naive', 'torch'):
        module.backend = backend
        outs.append(module(x))
    assert_close(*outs)


# Errors


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(dim=8.0), TypeError, 'dim must be an integer, got 8.0'),
        (dict(heads=0), ValueError, 'heads must be at least 1, got 0'),
        (dict(num_groups=3), ValueError, 'heads must be a multiple of num_groups, got'),
        (
            dict(offset_groups=3),
            ValueError,
            'heads must be a multiple of offset_groups',
        ),
        (
            dict(dim=9),
            ValueError,
            'dim must be a multiple of offset_groups, got 9 and 2',
        ),
        (
            dict(heads=8, offset_groups=8, num_groups=1),
            ValueError,
            r'dim_head \* num_groups must be a multiple of offset_groups, got 4 and 8',
        ),
        (dict(dropout=1), ValueError, 'dropout must be in'),
        (dict(group_queries=1), TypeError, 'group_queries must be a bool, got 1'),
        (dict(group_key_values=1), TypeError, 'group_key_values must be a bool'),
        (dict(offset_scale=-1), ValueError, 'offset_scale must be finite, at least 0'),
        (dict(offset_scale='4'), TypeError, "offset_scale must be a number, got '4'"),
        (dict(downsample_factor=0), ValueError, 'downsample_factor must be at least 1'),
        (
            dict(downsample_factor=(2, 2, 2)),
            ValueError,
            'downsample_factor must be one number or one for each of the 2 axes, got',
        ),
        (dict(offset_kernel_size=5), ValueError, 'offset_kernel_size must be .* got 5'),
        (dict(downsample_factor=6), ValueError, 'even number, got 4 and 6'),
        (dict(backend='cuda'), ValueError, "backend must be one .* got 'cuda'"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        DeformableAttention2D(**{**SMALL, **options})


def test_wrong_option_of_the_one_dimensional_form():
    with pytest.raises(TypeError, match='cpb_log_distance must be a bool, got 0'):
        DeformableAttention1D(dim=64, cpb_log_distance=0)


def test_bias_of_plain_distances():
    module = build(1, cpb_log_distance=False)
    x = torch.tensor([[-2.0], [0.5]]).double()
    hidden = F.relu(module.rel_pos_bias.mlp[0][0](x))
    expected = module.rel_pos_bias.mlp[2](module.rel_pos_bias.mlp[1](hidden))
    assert_close(module.rel_pos_bias(x), expected)


@pytest.mark.parametrize(
    ('x', 'error', 'message'),
    [
        (torch.ones(1, 32, 4, 4).long(), TypeError, 'x must be a floating tensor'),
        (torch.ones(1, 32, 4), ValueError, r'x must have shape \(B, C, H, W\), got'),
        (torch.ones(1, 7, 4, 4), ValueError, 'x must have dim = 32 channels, got'),
        (
            torch.ones(1, 32, 4, 1),
            ValueError,
            r'the map \(4, 1\) is smaller than a cell',
        ),
    ],
)
def test_wrong_input(x, error, message):
    with pytest.raises(error, match=message):
        DeformableAttention2D(**SMALL)(x)


@pytest.mark.parametrize(
    ('args', 'error', 'message'),
    [
        ((8,), ValueError, 'resolution must be odd, got 8'),
        ((1,), ValueError, 'resolution must be at least 3, got 1'),
        ((9.0,), TypeError, 'resolution must be an integer, got 9.0'),
        (((9, 9, 9),), ValueError, 'resolution must be one number or one for each'),
        ((9, (1, 8)), ValueError, 'map_size must be at least 2, got 1'),
    ],
)
def test_wrong_arguments_of_bake_position_bias(args, error, message):
    with pytest.raises(error, match=message):
        build(2).eval().bake_position_bias(*args)


def test_bake_position_bias_in_training():
    with pytest.raises(ValueError, match='a module in eval mode, got training=True'):
        build(2).bake_position_bias(9)


@pytest.mark.parametrize('axes', FORMS)
def test_registered(axes):
    assert MODELS.get(f'DeformableAttention{axes}D') is FORMS[axes]
