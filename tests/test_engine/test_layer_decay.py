"""Learning rates that fall towards the stem."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.optim import build_optim_wrapper
from torch import nn

import deform_gqa.engine  # noqa: F401
from deform_gqa.models import DAT

ARCH = dict(
    embed_dims=(8, 16, 16, 16),
    depths=(1, 2, 1, 1),
    num_heads=(2,) * 4,
    block_types=('D', 'XL', 'N', 'D'),
    layer_scale=(1e-5,) * 4,
)
BLOCKS = 5
LR = 0.1
# (number of its layer by block, by stage); 6 and 5 for what follows the backbone
LAYERS = {
    'backbone.patch_proj.0.weight': (0, 0),
    'backbone.stages.0.attns.0.rpe_table': (1, 1),
    'backbone.stages.0.layer_norms.1.norm.weight': (1, 1),
    'backbone.down_projs.0.0.weight': (2, 2),
    'backbone.stages.1.ln_cnvnxt.0.norm.weight': (2, 2),
    'backbone.stages.1.local_perception_units.1.weight': (3, 2),
    'backbone.stages.1.layer_norms.2.norm.bias': (3, 2),
    'backbone.stages.1.layer_scales.3.weight': (3, 2),
    'backbone.stages.1.mlps.1.linear2.0.weight': (3, 2),
    'backbone.down_projs.1.0.weight': (4, 3),
    'backbone.stages.3.attns.0.proj_q.weight': (5, 4),
    'backbone.norms.3.norm.weight': (6, 5),
    'head.weight': (6, 5),
}


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(2, 2)


@pytest.fixture(scope='module')
def detector():
    return Detector(DAT(ARCH))


def groups(model, **paramwise):
    """The optimizer's group of each parameter by name."""
    cfg = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=LR, weight_decay=0.05),
        paramwise_cfg=paramwise,
    )
    optimizer = build_optim_wrapper(model, cfg).optimizer
    of = {id(p): group for group in optimizer.param_groups for p in group['params']}
    return {name: of[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize('kind', ['layer_wise', 'stage_wise'])
def test_rates_by_layer(detector, kind):
    found = groups(detector, decay_rate=0.5, decay_type=kind)
    by_stage = kind == 'stage_wise'
    last = 5 if by_stage else BLOCKS + 1
    for name, layers in LAYERS.items():
        expected = LR * 0.5 ** (last - layers[by_stage])
        assert found[name]['lr'] == pytest.approx(expected, rel=1e-12), name


def test_no_layer_learns_faster_than_a_later_one(detector):
    found = groups(detector, decay_rate=0.7)
    rates = [group['lr'] for name, group in found.items() if '.attns.' in name]
    assert rates == sorted(rates) and len(set(rates)) == BLOCKS


def test_a_rate_of_one_and_other_rules_are_those_of_mmengine(detector):
    paramwise = dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'rpe_table': dict(decay_mult=0.0), 'head': dict(lr_mult=3.0)},
    )
    found = groups(detector, decay_rate=1, **paramwise)
    assert {group['lr'] for group in found.values()} == {LR, 3 * LR}
    found = groups(detector, decay_rate=0.5, **paramwise)
    assert found['head.weight']['lr'] == pytest.approx(3 * LR)
    assert found['backbone.stages.0.attns.0.rpe_table']['weight_decay'] == 0
    assert found['backbone.stages.0.layer_norms.1.norm.weight']['weight_decay'] == 0
    assert found['backbone.patch_proj.0.weight']['weight_decay'] == 0.05


def test_frozen_stages_and_fewer_stages():
    model = Detector(DAT(ARCH, out_indices=(0, 1), frozen_stages=1))
    trained = [value for value in model.parameters() if value.requires_grad]
    optim = build_optim_wrapper(
        model,
        dict(
            constructor='LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=LR),
            paramwise_cfg=dict(decay_rate=0.5),
        ),
    )
    assert len(optim.optimizer.param_groups) == len(trained)
    assert min(g['lr'] for g in optim.optimizer.param_groups) == LR * 0.5**2


def test_depth_within_the_backbone_itself(detector):
    assert detector.backbone.get_layer_depth('stages.1.attns.1.x') == (3, BLOCKS + 2)
    assert detector.backbone.get_layer_depth('stages.3.proj.weight') == (5, BLOCKS + 2)


@pytest.mark.parametrize(
    ('paramwise', 'error', 'message'),
    [
        (dict(norm_decay_mult=0.0), ValueError, 'paramwise_cfg needs decay_rate'),
        (dict(decay_rate='0.5'), TypeError, "decay_rate must be a number, got '0.5'"),
        (dict(decay_rate=True), TypeError, 'decay_rate must be a number, got True'),
        (dict(decay_rate=0), ValueError, r'decay_rate must be in \(0, 1\], got 0'),
        (dict(decay_rate=1.5), ValueError, r'decay_rate must be in \(0, 1\], got 1.5'),
        (
            dict(decay_rate=0.5, decay_type='block'),
            ValueError,
            "decay_type must be one of .*, got 'block'",
        ),
    ],
)
def test_wrong_options(detector, paramwise, error, message):
    with pytest.raises(error, match=message):
        groups(detector, **paramwise)


def test_a_backbone_without_layers():
    resnet = MODELS.build(dict(type='mmdet.ResNet', depth=18, base_channels=4))
    with pytest.raises(TypeError, match='get_layer_depth, got ResNet'):
        groups(Detector(resnet), decay_rate=0.5)


def test_an_optimizer_without_a_rate(detector):
    cfg = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='Adadelta'),
        paramwise_cfg=dict(decay_rate=0.5),
    )
    with pytest.raises(ValueError, match='optimizer needs lr, got'):
        build_optim_wrapper(detector, cfg)


def test_a_step_moves_early_layers_less():
    model = Detector(DAT(ARCH))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    found = groups(model, decay_rate=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    cfg = [dict(group, weight_decay=0.0) for group in found.values()]
    torch.optim.SGD(cfg).step()
    moved = {
        name: (before[name] - v.detach()).mean().item()
        for name, v in model.named_parameters()
    }
    assert moved['head.weight'] == pytest.approx(LR, rel=1e-4)
    assert moved['backbone.patch_proj.0.weight'] == pytest.approx(LR / 64, rel=1e-3)
