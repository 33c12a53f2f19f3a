"""swap_attention in small Deformable DETR and DINO detectors of mmdet's configs."""

import copy
from pathlib import Path

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn
from torch.testing import assert_close

from deform_gqa.models import MSDeformAttn, swap_attention

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


def run(model):
    """Losses and the gradients of all parameters."""
    torch.manual_seed(0)
    inputs = demo_mm_inputs(2, [[3, 96, 128], [3, 90, 100]], num_classes=4)
    for sample in inputs['data_samples']:
        sample.gt_instances.labels -= 1
    data = model.data_preprocessor(inputs, training=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(1)  # denoising queries are drawn
    losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    return losses, {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


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
    (loss, grads), (expected_loss, expected) = run(swapped), run(plain)
    assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        scale = expected[key].abs().max().item()
        assert_close(grad, expected[key], rtol=1e-3, atol=1e-3 * scale, msg=key)


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


def test_copies_of_a_swapped_model():
    """As for an exponential moving average."""
    model = copy.deepcopy(swap_attention(Detector(), [RULE]))
    assert all(isinstance(x, MSDeformAttn) for x in model.encoder)


def test_fewer_value_heads_draw_new_weights():
    rule = dict(RULE, num_value_heads=2)
    with pytest.raises(ValueError, match=r'encoder\.0 do not fit MSDeformAttn'):
        swap_attention(Detector(), [rule])
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


def trained_weights(name, steps):
    torch.manual_seed(0)
    model = MODELS.build(small_config(name))
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model)
        optimizer.step()
    return model.state_dict()


def test_trainings_are_reproducible_to_the_bit():
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (trained_weights(DETECTORS[1], steps=3) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for key, x in first.items():
        assert torch.equal(x, second[key]), key
