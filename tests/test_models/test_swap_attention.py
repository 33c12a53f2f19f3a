"""swap_attention in small detectors of mmdet's configs."""

import copy
import re
from pathlib import Path

import pytest
import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.backbones import SwinTransformer
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from torch import nn
from torch.testing import assert_close

from deform_gqa.models import (
    GroupedMultiheadAttention,
    GroupedWindowMSA,
    MSDeformAttn,
    NeighborhoodAttention,
    swap_attention,
)

FOLDER = Path(__file__).parents[2] / 'configs' / 'swap_attention'
DETECTORS = ['deformable-detr_r50_16xb2-50e_coco', 'dino-4scale_r50_8xb2-12e_coco']
RULE = dict(pattern='encoder|decoder', type='MSDeformAttn')


@pytest.fixture(autouse=True, scope='module')
def _registered():
    register_all_modules()


def small_config(name):
    """The config's model with fewer and thinner layers."""
    cfg = Config.fromfile(FOLDER / f'{name}.py').model
    model = cfg.model
    model.backbone.update(depth=18, init_cfg=None)
    model.neck.in_channels = [128, 256, 512]
    model.encoder.num_layers, model.decoder.num_layers = 1, 2
    model.num_queries = 20
    model.bbox_head.num_classes = 3
    return cfg


def run(model, with_mask=False):
    """Losses and the gradients of all parameters."""
    torch.manual_seed(0)
    inputs = demo_mm_inputs(
        2, [[3, 96, 128], [3, 90, 100]], num_classes=4, with_mask=with_mask
    )
    for sample in inputs['data_samples']:
        sample.gt_instances.labels -= 1
    data = model.data_preprocessor(inputs, training=True)
    data['inputs'] = data['inputs'].to(next(model.parameters()).dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, GroupedMultiheadAttention)):
            module.dropout = 0.0
    torch.manual_seed(1)  # denoising queries are drawn
    losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    return losses, {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same_function(model, reference):
    (loss, grads), (expected_loss, expected) = run(model), run(reference)
    assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        scale = expected[key].abs().max().item()
        assert_close(grad, expected[key], rtol=1e-3, atol=1e-3 * scale, msg=key)


@pytest.mark.parametrize('name', DETECTORS)
def test_a_swapped_detector_is_the_same_function(name):
    cfg = small_config(name)
    torch.manual_seed(0)
    swapped = MODELS.build(copy.deepcopy(cfg))
    swapped.init_weights()
    for module in swapped.modules():
        if isinstance(module, MSDeformAttn):
            # At first they lie on pixels, where rounding decides about the slope
            nn.init.uniform_(module.sampling_offsets.bias, -3.0, 3.0)
    plain = MODELS.build(cfg.model)
    assert list(swapped.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(swapped.state_dict())
    layers = [x for x in swapped.modules() if isinstance(x, MSDeformAttn)]
    assert len(layers) == 3
    # with the denoising queries' mask in DINO
    rule = dict(pattern='decoder', type='GroupedMultiheadAttention')
    swap_attention(swapped, [rule])
    heads = [x for x in swapped.modules() if isinstance(x, GroupedMultiheadAttention)]
    assert len(heads) == 2
    assert_same_function(swapped, plain)


@pytest.mark.parametrize('name', DETECTORS)
def test_a_swapped_detector_is_initialised_the_same(name):
    """Detectors find their attention modules by class, to initialise them last."""
    cfg, states = small_config(name), []
    for part in (cfg, cfg.model):
        torch.manual_seed(0)
        model = MODELS.build(copy.deepcopy(part))
        torch.manual_seed(0)
        model.init_weights()
        states.append(model.state_dict())
    for key, x in states[1].items():
        assert_close(states[0][key], x, rtol=1e-6, atol=1e-6, msg=key)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        options = dict(embed_dims=32, num_heads=4, num_levels=2, num_points=3)
        self.encoder = nn.ModuleList(
            MultiScaleDeformableAttention(dropout=0.2, batch_first=True, **options)
            for _ in range(2)
        )


def test_options_weights_and_state_are_kept():
    model = Detector().double().eval()
    state = copy.deepcopy(model.state_dict())
    assert swap_attention(model, [dict(RULE, pattern=r'encoder\.1', backend='torch')])
    kept, new = model.encoder
    assert not isinstance(kept, MSDeformAttn)
    assert isinstance(new, MSDeformAttn)
    assert isinstance(new, MultiScaleDeformableAttention)
    assert (new.num_heads, new.num_points, new.dropout.p) == (4, 3, 0.2)
    assert new.batch_first and not new.training and new.backend == 'torch'
    for key, x in model.state_dict().items():
        assert torch.equal(x, state[key])


@pytest.mark.parametrize('num_value_heads', [4, 2])
def test_what_is_kept_stays_frozen(num_value_heads):
    model = Detector()
    model.encoder[0].value_proj.requires_grad_(False)
    model.encoder[0].output_proj.requires_grad_(False)
    rule = dict(RULE, num_value_heads=num_value_heads, keep_weights='fitting')
    swap_attention(model, [rule])
    frozen = {
        name.split('.')[2]
        for name, parameter in model.encoder.named_parameters(prefix='encoder')
        if not parameter.requires_grad
    }
    kept = {'value_proj'} if num_value_heads == 4 else set()
    assert frozen == {'output_proj'} | kept
    assert all(x.requires_grad for x in model.encoder[1].parameters())


def test_fewer_value_heads_draw_new_weights():
    rule = dict(RULE, num_value_heads=2)
    for keep_weights in (True, 1):
        with pytest.raises(ValueError, match=r'encoder\.0 do not fit MSDeformAttn'):
            swap_attention(Detector(), [dict(rule, keep_weights=keep_weights)])
    model = swap_attention(Detector(), [dict(rule, keep_weights=False)])
    assert model.encoder[0].value_proj.weight.shape == (16, 32)


@pytest.mark.parametrize(
    ('rule', 'message'),
    [
        (dict(type='MSDeformAttn'), "needs 'pattern'"),
        (dict(pattern='encoder'), "needs 'type'"),
        (dict(RULE, pattern='neck'), 'no MultiScaleDeformableAttention .*neck'),
        (dict(RULE, replaces='Linears'), 'no Linears of the model'),
        (dict(RULE, type='NoSuchThing'), "'NoSuchThing' is not registered"),
    ],
)
def test_bad_rules(rule, message):
    with pytest.raises(ValueError, match=message):
        swap_attention(Detector(), [rule])


def small_detr():
    model = Config.fromfile(FOLDER / 'detr_r50_8xb2-150e_coco.py').model
    detr = model.model
    detr.backbone.update(depth=18, init_cfg=None)
    detr.neck.in_channels = [512]
    detr.encoder.num_layers, detr.decoder.num_layers = 1, 2
    detr.num_queries, detr.bbox_head.num_classes = 10, 3
    return model


def small_mask2former():
    model = Config.fromfile(FOLDER / 'mask2former_r50_8xb2-lsj-50e_coco.py').model
    mask2former = model.model
    mask2former.data_preprocessor.batch_augments = None
    mask2former.backbone.update(depth=18, init_cfg=None)
    head = mask2former.panoptic_head
    head.update(in_channels=[64, 128, 256, 512], num_queries=10, num_things_classes=3)
    head.pixel_decoder.encoder.num_layers = 1
    head.transformer_decoder.num_layers = 2
    head.loss_cls.class_weight = [1.0] * 3 + [0.1]
    mask2former.panoptic_fusion_head.num_things_classes = 3
    mask2former.train_cfg.num_points = 100
    return model


def small_swin():
    model = Config.fromfile(FOLDER / 'retinanet_swin-t-p4-w7_fpn_1x_coco.py').model
    swin = model.model
    swin.backbone.update(
        embed_dims=24, depths=[2, 1, 1, 1], init_cfg=None, drop_path_rate=0.0
    )
    swin.neck.in_channels = [48, 96, 192]
    swin.bbox_head.num_classes = 3
    return model


# config, modules of each class, rules that leave the function as it is
SMALL = {
    'detr': (
        small_detr,
        {GroupedMultiheadAttention: 5},
        [dict(pattern='encoder|decoder', type='GroupedMultiheadAttention')],
    ),
    'mask2former': (
        small_mask2former,
        {MSDeformAttn: 1, GroupedMultiheadAttention: 4},
        [
            dict(pattern='pixel_decoder', type='MSDeformAttn'),
            dict(pattern='decoder', type='GroupedMultiheadAttention'),
        ],
    ),
    'swin': (
        small_swin,
        {GroupedWindowMSA: 5},
        [dict(pattern='backbone', type='GroupedWindowMSA')],
    ),
}


# In float32, rounding moves activations of Swin's detector across the kinks of ReLUs;
# in float64, DETR's matching does not run.
@pytest.mark.parametrize(
    ('name', 'dtype'), [('detr', torch.float32), ('swin', torch.float64)]
)
def test_full_kv_heads_are_the_same_function(name, dtype):
    build, counts, rules = SMALL[name]
    torch.manual_seed(0)
    plain = MODELS.build(build().model)
    plain.init_weights()
    plain.to(dtype)
    swapped = swap_attention(copy.deepcopy(plain), rules)
    for cls, count in counts.items():
        assert sum(isinstance(module, cls) for module in swapped.modules()) == count
    assert list(swapped.state_dict()) == list(plain.state_dict())
    assert_same_function(swapped, plain)


@pytest.mark.parametrize('name', SMALL)
def test_configs_train(name):
    """The config's own rules; one batch over and over."""
    build, counts, _ = SMALL[name]
    torch.manual_seed(0)
    model = MODELS.build(build())
    model.init_weights()
    for cls, count in counts.items():
        assert sum(isinstance(module, cls) for module in model.modules()) == count
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(run(model, with_mask=name == 'mask2former')[0].item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < losses[0]


def test_attention_of_blocks_in_swin():
    swin = SwinTransformer(
        embed_dims=16, depths=(1, 1), num_heads=(2, 4), strides=(4, 2), out_indices=(1,)
    )
    rule = dict(pattern='stages.0', type='NeighborhoodAttention', num_kv_heads=1)
    with pytest.raises(ValueError, match=r'attn do not fit MapAttention: w_msa'):
        swap_attention(copy.deepcopy(swin), [rule])
    with pytest.raises(ValueError, match=r'num_kv_heads=3; possible are \[1, 2\]'):
        swap_attention(copy.deepcopy(swin), [dict(rule, num_kv_heads=3)])
    swap_attention(swin, [dict(rule, keep_weights=False)])
    swin.init_weights()
    block = swin.stages[0].blocks[0].attn.attention
    assert isinstance(block, NeighborhoodAttention)
    assert (block.dim, block.num_heads, block.num_kv_heads) == (16, 2, 1)
    (out,) = swin(torch.randn(1, 3, 44, 60))
    assert out.shape == (1, 32, 6, 8)
    out.square().mean().backward()
    assert block.qkv.weight.grad.any()


@pytest.mark.parametrize(
    'options',
    [
        dict(type='DepthwiseConv'),
        dict(type='DeformableAttention2D', heads=2, dim_head=4, downsample_factor=2),
    ],
)
def test_any_block_in_swin(options):
    """Those too that are no BaseAttention, and take no ``num_heads``."""
    swin = SwinTransformer(
        embed_dims=8, depths=(1,), num_heads=(2,), strides=(4,), out_indices=(0,)
    )
    swap_attention(swin, [dict(options, pattern='stages', keep_weights=False)])
    (out,) = swin(torch.randn(1, 3, 20, 28))
    assert out.shape == (1, 8, 5, 7)


class Plain(nn.Module):
    """Attention of torch, and of mmcv around torch's."""

    def __init__(self):
        super().__init__()
        self.text = nn.MultiheadAttention(16, 4, batch_first=True)
        self.image = MultiheadAttention(16, 4, attn_drop=0.1, batch_first=True)


MHA = dict(type='GroupedMultiheadAttention')


@pytest.mark.parametrize(
    ('rule', 'swapped'),
    [
        (dict(pattern='.'), ['text', 'image.attn']),
        (dict(pattern='image$'), ['image.attn']),
        (dict(pattern='.', replaces='mmcv.MultiheadAttention'), ['image.attn']),
        (
            dict(pattern='.', replaces='torch.MultiheadAttention'),
            ['text', 'image.attn'],
        ),
        (dict(pattern='text', replaces='MultiheadAttention'), ['text']),
    ],
)
def test_by_class_and_pattern(rule, swapped):
    torch.manual_seed(0)
    plain = Plain().eval()
    model = swap_attention(copy.deepcopy(plain), [dict(rule, **MHA)])
    found = [n for n, _ in model.named_modules() if n]
    kinds = (GroupedMultiheadAttention,)
    assert [n for n in found if isinstance(model.get_submodule(n), kinds)] == swapped
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 4:] = True
    for name in ('text', 'image'):
        actual, expected = (
            m.get_submodule(name)(x, y, y, key_padding_mask=mask)
            for m in (model, plain)
        )
        assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_torchs_encoder_takes_padding():
    """In evaluation it packs padded sequences, for which torch alone has a kernel."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False] * 3, [False, True, True]])
    wanted = encoder(x, src_key_padding_mask=padding)
    out = swap_attention(encoder, [dict(MHA, pattern='.')])(
        x, src_key_padding_mask=padding
    )
    assert_close(out[~padding], wanted[~padding])


@pytest.mark.parametrize('kind', [MultiheadAttention, nn.MultiheadAttention])
def test_a_module_in_two_places_stays_one(kind):
    block = nn.ModuleDict(dict(attn=kind(8, 4)))
    model = nn.ModuleDict(dict(first=block, second=block, third=block['attn']))
    swap_attention(model, [dict(MHA, pattern='.')])
    assert model['first']['attn'] is model['second']['attn'] is model['third']
    torchs = [x for x in model.modules() if isinstance(x, nn.MultiheadAttention)]
    assert not torchs


@pytest.mark.parametrize('kind', [MultiheadAttention, nn.MultiheadAttention])
def test_the_model_itself(kind):
    model = swap_attention(kind(8, 4), [dict(MHA, pattern='')])
    swapped = model if kind is nn.MultiheadAttention else model.attn
    assert isinstance(swapped, GroupedMultiheadAttention)


def test_what_does_not_fit_is_listed(caplog):
    rule = dict(MHA, pattern='text', num_kv_heads=2)
    misfit = r'in_proj_weight: \(48, 16\) -> \(32, 16\); in_proj_bias'
    with pytest.raises(ValueError, match=f'weights of text do not fit.*{misfit}'):
        swap_attention(Plain(), [rule])
    model = Plain()
    weight = model.text.out_proj.weight.clone()
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    swap_attention(model, [dict(rule, keep_weights='fitting')])
    logger.removeHandler(caplog.handler)
    assert re.search(f'new weights in text: {misfit}', caplog.text)
    assert torch.equal(model.text.out_proj.weight, weight)
    assert model.text.in_proj_weight.shape == (32, 16)
    drawn = swap_attention(Plain(), [dict(rule, keep_weights=False)])
    assert not torch.equal(drawn.text.out_proj.weight, weight)


def test_weights_that_the_old_module_lacks_are_listed():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    rule = dict(pattern='0', type=nn.Linear, replaces='Linear', bias=True)
    with pytest.raises(ValueError, match=r'bias: none -> \(4,\)'):
        swap_attention(model, [rule])


@pytest.mark.parametrize(
    ('rule', 'error', 'message'),
    [
        (dict(MHA, pattern='text', keep_weights='all'), ValueError, "got 'all'"),
        (dict(MHA, pattern='neck'), ValueError, r'are MultiheadAttention \(as text\)'),
        (
            dict(MHA, pattern='.', replaces='mmdet.MultiheadAttention'),
            ValueError,
            'no mmdet.MultiheadAttention',
        ),
        (dict(MHA, pattern='.', replaces='Linear'), ValueError, 'no Linear of'),
        (
            dict(MHA, pattern='proj', replaces='NonDynamicallyQuantizableLinear'),
            ValueError,
            'but text.out_proj is a NonDyn',
        ),
        (
            dict(pattern='.', type='NoSuchThing'),
            ValueError,
            'for blocks are .*LinformerAttention, .*WindowAttention',
        ),
        (
            dict(MHA, pattern='text', num_kv_heads=3),
            ValueError,
            r'num_kv_heads=3; possible are \[1, 2, 4\]',
        ),
        (dict(MHA, pattern='text', heads=2), TypeError, "'heads'"),
        (dict(MHA, pattern=3), TypeError, 'pattern must be a string, got 3'),
        (dict(MHA, pattern='('), ValueError, r"pattern .* got '\(': missing"),
        (dict(pattern='.', type=3), TypeError, 'type must be a class .* got 3'),
        (
            dict(pattern='.', type='swap_attention'),
            TypeError,
            "must be a class of modules, got 'swap_attention'",
        ),
        (dict(MHA, pattern='.', replaces=3), TypeError, 'replaces must name a class'),
        ('text', TypeError, "rules must be dicts in a list, got 'text'"),
    ],
)
def test_errors_say_what_is_possible(rule, error, message):
    with pytest.raises(error, match=message):
        swap_attention(Plain(), [rule])


@pytest.mark.parametrize('rules', [None, dict(MHA, pattern='text')])
def test_rules_that_are_no_list(rules):
    with pytest.raises(TypeError, match='rules must be dicts in a list, got'):
        swap_attention(Plain(), rules)


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match='model must be a dict or a module, got 3'):
        swap_attention(3, [])
