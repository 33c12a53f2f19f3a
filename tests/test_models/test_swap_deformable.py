"""Deformable DETR and DINO with our attention: weights, copies, repeated trainings."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config

from deform_gqa.models import MSDeformAttn, swap_attention

FOLDER = Path(__file__).parents[2] / 'configs' / 'swap_attention'
DETECTORS = ['deformable-detr_r50_16xb2-50e_coco', 'dino-4scale_r50_8xb2-12e_coco']
ITERATIONS = 20
RULE = dict(pattern='encoder', type='MSDeformAttn')


@pytest.fixture(autouse=True, scope='module')
def _registered():
    register_all_modules()


def config(name):
    return Config.fromfile(FOLDER / f'{name}.py').model


def tiny_config(name):
    """The config's model with few thin layers."""
    cfg = config(name)
    model = cfg.model
    model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    model.neck.in_channels = [16, 32, 64]
    for part in (model.encoder, model.decoder):
        part.num_layers = 1
        part.layer_cfg.ffn_cfg.feedforward_channels = 32
    model.num_queries = 10
    model.bbox_head.num_classes = 3
    return cfg


@pytest.mark.parametrize('name', DETECTORS)
def test_official_weights_fit(name):
    """Names and shapes of the whole model are those of mmdet's own, as built by it."""
    cfg = config(name)
    with torch.device('meta'):
        swapped = MODELS.build(copy.deepcopy(cfg))
        stock = MODELS.build(cfg.model)
    assert sum(isinstance(x, MSDeformAttn) for x in swapped.modules()) == 12
    expected = {key: x.shape for key, x in stock.state_dict().items()}
    assert {key: x.shape for key, x in swapped.state_dict().items()} == expected
    official = {key: torch.zeros(shape) for key, shape in expected.items()}
    swapped.load_state_dict(official, assign=True)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('copied', [copy.deepcopy, pickled, saved_and_loaded])
def test_copies_of_a_swapped_model(copied):
    """As for an exponential moving average, or another process."""
    model = torch.nn.Module()
    model.encoder = MultiScaleDeformableAttention(32, 4, 2, 3)
    model = swap_attention(model, [RULE]).eval()
    twin = copied(model)
    for cls in (MSDeformAttn, MultiScaleDeformableAttention):
        assert isinstance(twin.encoder, cls)
    assert type(twin.encoder) is type(model.encoder) and not twin.encoder.training
    assert twin.encoder.num_points == 3
    for key, x in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], x)


def losses_of_a_training(name):
    torch.manual_seed(0)
    model = MODELS.build(tiny_config(name))
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(ITERATIONS):
        inputs = demo_mm_inputs(2, [[3, 48, 64], [3, 40, 50]], num_classes=4)
        for sample in inputs['data_samples']:
            sample.gt_instances.labels -= 1
        data = model.data_preprocessor(inputs, training=True)
        torch.manual_seed(step)  # denoising queries and dropout are drawn
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize('name', DETECTORS)
def test_trainings_are_reproducible_to_the_bit(name):
    torch.use_deterministic_algorithms(True)
    try:
        (losses, first), (again, second) = (
            losses_of_a_training(name) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses == again and len(set(losses)) == ITERATIONS
    for key, x in first.items():
        assert torch.equal(x, second[key]), key
