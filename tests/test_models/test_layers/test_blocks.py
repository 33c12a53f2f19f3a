"""What all block modules have in common: interface, grouped heads, odd maps, errors."""

import pytest
import torch
from mmdet.registry import MODELS
from torch.testing import assert_close

from deform_gqa.models import (
    DeformableGQA,
    DepthwiseConv,
    GroupedQueryAttention,
    LinformerAttention,
    NeighborhoodAttention,
    PerQueryDeformableAttention,
    PyramidAttention,
    ShiftedWindowAttention,
    WindowAttention,
)
from deform_gqa.models.layers.base_attention import BaseAttention
from deform_gqa.models.layers.deformable_gqa import reference_points

DIM, HEADS = 32, 4
ATTENTION = {
    DeformableGQA: dict(table_size=6, offset_groups=2, stride=2),
    GroupedQueryAttention: {},
    LinformerAttention: dict(n=(4, 5), k=6),
    NeighborhoodAttention: dict(kernel_size=3),
    PerQueryDeformableAttention: dict(num_points=3, offset_groups=2),
    PyramidAttention: dict(sr_ratio=2),
    ShiftedWindowAttention: dict(window_size=4),
    WindowAttention: dict(window_size=4),
}
# Parameters of keys and values: (name, rows of q before them).
KV_PARAMETERS = {
    DeformableGQA: [('proj_k', 0), ('proj_v', 0)],
    GroupedQueryAttention: [('proj_k', 0), ('proj_v', 0)],
    LinformerAttention: [('proj_k', 0), ('proj_v', 0)],
    NeighborhoodAttention: [('qkv', DIM)],
    PerQueryDeformableAttention: [('proj_kv', 0)],
    PyramidAttention: [('kv', 0)],
    ShiftedWindowAttention: [('proj_qkv', DIM)],
    WindowAttention: [('proj_qkv', DIM)],
}


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize('module_class', ATTENTION)
@pytest.mark.parametrize('kv_heads', [1, 4])
def test_base_class(module_class, kv_heads):
    module = module_class(
        DIM, HEADS, kv_heads, attn_drop=0.25, **ATTENTION[module_class]
    )
    assert isinstance(module, BaseAttention)
    assert (module.dim, module.num_heads, module.num_kv_heads) == (DIM, 4, kv_heads)
    assert (module.head_dim, module.kv_dim) == (8, 8 * kv_heads)
    assert module.dropout_p == 0.25
    assert module.eval().dropout_p == 0.0


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(dim=True), TypeError, 'dim must be an integer, got True'),
        (dict(dim=0), ValueError, 'dim must be at least 1, got 0'),
        (dict(dim=30), ValueError, 'dim must be a multiple .* dim=30, num_heads=4'),
        (dict(backend='trition'), ValueError, "backend must be one .* got 'trition'"),
    ],
)
def test_options_of_the_base_class(options, error, message):
    with pytest.raises(error, match=message):
        BaseAttention(**{**dict(dim=DIM, num_heads=HEADS), **options})


@pytest.mark.parametrize('module_class', [*ATTENTION, DepthwiseConv])
def test_registered(module_class):
    assert MODELS.get(module_class.__name__) is module_class


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (3, 5), (8, 8), (13, 10)])
@pytest.mark.parametrize('module_class', [*ATTENTION, DepthwiseConv])
def test_any_map_size(module_class, size):
    module = module_class(DIM, HEADS, **ATTENTION.get(module_class, {}))
    x = draw(2, DIM, *size, dtype=torch.float32).requires_grad_()
    out = module(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


def repeat_rows(tensor, first, repeats):
    """kv rows of a projection, head by head, repeated for each head of the group."""
    head_dim = DIM // HEADS
    heads = tensor[first:].unflatten(0, (-1, head_dim))
    repeated = heads.repeat_interleave(repeats, 0).flatten(0, 1)
    return torch.cat([tensor[:first], repeated])


@pytest.mark.parametrize('kv_heads', [1, 2])
@pytest.mark.parametrize('module_class', ATTENTION)
def test_grouped_heads_equal_repeated_kv_weights(module_class, kv_heads):
    options = ATTENTION[module_class]
    grouped = module_class(DIM, HEADS, num_kv_heads=kv_heads, **options).double()
    full = module_class(DIM, HEADS, **options).double()
    state = grouped.state_dict()
    for name, first in KV_PARAMETERS[module_class]:
        for kind in ('weight', 'bias'):
            key = f'{name}.{kind}'
            state[key] = repeat_rows(state[key], first, HEADS // kv_heads)
    full.load_state_dict(state)
    x = draw(2, DIM, 7, 9)
    assert_close(grouped(x), full(x))


@pytest.mark.parametrize('module_class', ATTENTION)
def test_dropout_in_training_only(module_class):
    module = module_class(
        DIM, HEADS, attn_drop=0.5, proj_drop=0.5, **ATTENTION[module_class]
    )
    x = draw(1, DIM, 8, 8, dtype=torch.float32)
    torch.manual_seed(0)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize('module_class', ATTENTION)
def test_autocast(module_class):
    module = module_class(DIM, HEADS, **ATTENTION[module_class])
    x = draw(1, DIM, 8, 8, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        out = module(x)
    out.float().sum().backward()
    assert_close(out.float(), module(x), rtol=0.1, atol=0.1)
    assert all(p.grad.dtype == p.dtype for p in module.parameters())


@pytest.mark.parametrize('module_class', ATTENTION)
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_heads=5), 'dim=32, num_heads=5'),
        (dict(num_heads=4, num_kv_heads=3), 'num_kv_heads=3'),
        (dict(num_heads=4, num_kv_heads=0), 'num_kv_heads .* got 0'),
    ],
)
def test_bad_heads(module_class, options, message):
    with pytest.raises(ValueError, match=message):
        module_class(DIM, **{**ATTENTION[module_class], **options})


@pytest.mark.parametrize(
    ('module_class', 'options', 'message'),
    [
        (DeformableGQA, dict(), 'needs a table_size .* got None'),
        (DeformableGQA, dict(table_size=(0, 4)), r'got \(0, 4\)'),
        (DeformableGQA, dict(table_size=8, offset_groups=3), 'offset_groups=3'),
        (DeformableGQA, dict(table_size=8, stride=0), 'stride .* got 0'),
        (DeformableGQA, dict(table_size=8, offset_kernel_size=0), 'got 0'),
        (DeformableGQA, dict(position_bias='rope'), "got 'rope'"),
        (NeighborhoodAttention, dict(kernel_size=4), 'kernel_size .* got 4'),
        (NeighborhoodAttention, dict(dilation=0), 'dilation .* got 0'),
        (PyramidAttention, dict(sr_ratio=0), 'sr_ratio .* got 0'),
        (WindowAttention, dict(window_size=0), 'window_size .* got 0'),
        (ShiftedWindowAttention, dict(window_size=1), 'window_size'),
        (DepthwiseConv, dict(kernel_size=4), 'kernel_size must be odd, got 4'),
    ],
)
def test_bad_options(module_class, options, message):
    with pytest.raises(ValueError, match=message):
        module_class(DIM, HEADS, **options)


@pytest.mark.parametrize('module_class', ATTENTION)
@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(num_kv_heads=1.0), TypeError, 'num_kv_heads .* integer, got 1.0'),
        (dict(num_heads=4.0), TypeError, 'num_heads .* integer, got 4.0'),
        (dict(num_heads=True), TypeError, 'num_heads .* integer, got True'),
        (dict(num_kv_heads=True), TypeError, 'num_kv_heads .* integer, got True'),
        (dict(attn_drop=False), TypeError, 'attn_drop must be a number, got False'),
        (dict(attn_drop=1.5), ValueError, r'attn_drop must be in \[0, 1\), got 1.5'),
        (dict(proj_drop='0.1'), TypeError, "proj_drop must be a number, got '0.1'"),
        (dict(proj_drop=True), TypeError, 'proj_drop must be a number, got True'),
    ],
)
def test_bad_shared_options(module_class, options, error, message):
    options = {**ATTENTION[module_class], 'num_heads': HEADS, **options}
    with pytest.raises(error, match=message):
        module_class(DIM, **options)


@pytest.mark.parametrize(
    ('module_class', 'options', 'message'),
    [
        (DeformableGQA, dict(table_size=(4, 4, 4)), r'table_size .* \(4, 4, 4\)'),
        (DeformableGQA, dict(table_size=8.0), 'table_size .* got 8.0'),
        (DeformableGQA, dict(table_size=8, stride=2.0), 'stride .* got 2.0'),
        (DeformableGQA, dict(table_size=True), 'table_size .* got True'),
        (DeformableGQA, dict(offset_groups=True), 'offset_groups .* got True'),
        (
            DeformableGQA,
            dict(table_size=8, offset_range_factor=None),
            'offset_range_factor must be a number, got None',
        ),
        (NeighborhoodAttention, dict(kernel_size=(3, 3)), r'kernel_size .* \(3, 3\)'),
        (PyramidAttention, dict(sr_ratio='2'), "sr_ratio .* got '2'"),
        (WindowAttention, dict(window_size=(4, 4, 4)), r'window_size .* \(4, 4, 4\)'),
        (DepthwiseConv, dict(kernel_size=(3, 3)), r'kernel_size .* got \(3, 3\)'),
        (DepthwiseConv, dict(kernel_size=True), 'kernel_size .* got True'),
    ],
)
def test_options_of_another_type(module_class, options, message):
    with pytest.raises(TypeError, match=message):
        module_class(DIM, HEADS, **options)


@pytest.mark.parametrize('module_class', [DeformableGQA, NeighborhoodAttention])
def test_unknown_backend(module_class):
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'trition'"):
        module_class(DIM, HEADS, **ATTENTION[module_class], backend='trition')


@pytest.mark.parametrize('module_class', [WindowAttention, ShiftedWindowAttention])
def test_empty_batch_of_windows(module_class):
    module = module_class(DIM, HEADS, window_size=4)
    x = torch.zeros(0, DIM, 6, 9, requires_grad=True)
    out = module(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert not module.proj_qkv.weight.grad.any()


class TestDeformableGQA:
    @pytest.mark.parametrize(
        ('size', 'options'),
        [
            ((7, 7), dict(stride=2)),
            ((6, 8), dict(stride=2, offset_kernel_size=4)),
            ((9, 7), dict(stride=3, offset_kernel_size=3)),
            ((5, 8), dict(stride=3)),
        ],
    )
    def test_fixed_bias_runs_at_its_own_size(self, size, options):
        module = DeformableGQA(
            DIM, HEADS, table_size=size, position_bias='fixed', **options
        )
        assert module(torch.rand(1, DIM, *size)).shape == (1, DIM, *size)
        with pytest.raises(ValueError, match=r"'fixed' is made for .* got a map"):
            module(torch.rand(1, DIM, size[0], size[1] + 1))

    def test_fixed_bias_of_a_transposed_map(self):
        module = DeformableGQA(DIM, HEADS, table_size=(4, 8), position_bias='fixed')
        with pytest.raises(
            ValueError, match=r'table_size=\(4, 8\), got a map \(8, 4\)'
        ):
            module(torch.rand(1, DIM, 8, 4))

    def test_fixed_bias_of_a_map_without_keys(self):
        options = dict(stride=8, offset_kernel_size=8, position_bias='fixed')
        with pytest.raises(ValueError, match=r'the map \(4, 8\) is smaller'):
            DeformableGQA(DIM, HEADS, table_size=(4, 8), **options)

    def test_fixed_bias(self):
        module = DeformableGQA(
            DIM, HEADS, 2, stride=2, table_size=(6, 8), position_bias='fixed'
        ).double()
        assert module.rpe_table.shape == (HEADS, 48, 12)
        x = draw(2, DIM, 6, 8)
        out = module(x)
        # A constant bias changes nothing, another one does.
        with torch.no_grad():
            module.rpe_table += 3
            assert_close(module(x), out)
            module.rpe_table[:, :, 0] += 3
            assert not torch.allclose(module(x), out)
        with pytest.raises(
            ValueError, match=r"'fixed' is made for .*\(6, 8\), got a map"
        ):
            module(draw(2, DIM, 8, 8))

    def test_map_smaller_than_unpadded_offset_kernel(self):
        module = DeformableGQA(DIM, HEADS, stride=4, offset_kernel_size=4, table_size=8)
        assert module(torch.rand(1, DIM, 9, 4)).shape == (1, DIM, 9, 4)
        with pytest.raises(ValueError, match='offset_kernel_size = stride = 4'):
            module(torch.rand(1, DIM, 9, 3))

    def test_positions(self):
        """float32 under autocast, within the map or within the offset range."""
        free = DeformableGQA(DIM, HEADS, offset_groups=2, stride=2, table_size=8)
        near = DeformableGQA(
            DIM, HEADS, offset_groups=2, stride=2, table_size=8, offset_range_factor=2
        )
        for module in (free, near):
            module.conv_offset[3].weight.data *= 1e4
        q = torch.randn(2, DIM, 9, 12)
        with torch.autocast('cpu', torch.bfloat16):
            pos = free.sampling_positions(q.bfloat16())
        assert pos.dtype == torch.float32 and pos.shape == (2, 2, 30, 2)
        assert pos.abs().max() <= 1
        offset = near.sampling_positions(q) - reference_points((5, 6), q)
        assert (offset.abs() <= torch.tensor([2 / 4, 2 / 5]) + 1e-5).all()

    def test_no_offset_has_no_bias_and_frozen_offset_network(self):
        module = DeformableGQA(DIM, HEADS, stride=2, use_offset=False)
        assert module.rpe_table is None
        assert not any(p.requires_grad for p in module.conv_offset.parameters())
        assert module(torch.rand(1, DIM, 7, 9)).shape == (1, DIM, 7, 9)

    def test_log_cpb_in_blocks(self, monkeypatch):
        module = DeformableGQA(
            DIM, HEADS, 2, offset_groups=2, stride=2, position_bias='log_cpb'
        ).double()
        x = draw(2, DIM, 7, 9).requires_grad_()
        whole = module(x)
        grad = torch.autograd.grad(whole.square().sum(), x)[0]
        path = 'deform_gqa.models.layers.position_bias.MAX_LOG_CPB_HIDDEN'
        monkeypatch.setattr(path, 1)
        rows = module(x)
        assert_close(rows, whole)
        assert_close(torch.autograd.grad(rows.square().sum(), x)[0], grad)
        with torch.no_grad():
            assert_close(module(x), whole)

    def test_compiles_without_graph_break(self):
        module = DeformableGQA(DIM, HEADS, 2, stride=2, table_size=8)
        x = torch.rand(1, DIM, 8, 8)
        compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
        assert_close(compiled(x), module(x))


class TestShiftedWindow:
    def test_shift_back_and_forth(self):
        """Without masks, a rolled map gives the rolled result of plain windows."""
        module = ShiftedWindowAttention(DIM, HEADS, window_size=4).double()
        plain = WindowAttention(DIM, HEADS, window_size=4).double()
        plain.load_state_dict(module.state_dict())
        x = draw(2, DIM, 8, 12)
        rolled = plain(torch.roll(x, (-2, -2), (2, 3)))
        assert module.masks.any()
        assert not torch.allclose(module(x), torch.roll(rolled, (2, 2), (2, 3)))
        module.masks.zero_()
        assert_close(module(x), torch.roll(rolled, (2, 2), (2, 3)))

    def test_regions_do_not_mix(self):
        """The map's last rows see nothing of its first ones."""
        module = ShiftedWindowAttention(DIM, HEADS, window_size=4).double()
        x = draw(1, DIM, 8, 8)
        changed = x.clone()
        changed[..., :2, :] += 1
        assert_close(module(x)[..., 6:, :], module(changed)[..., 6:, :])
