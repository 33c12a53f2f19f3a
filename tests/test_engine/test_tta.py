import pytest
from mmengine.config import Config

from deform_gqa.engine.tta import use_tta

FLIP = dict(type='RandomFlip', prob=1.0)
PACK = dict(type='PackDetInputs')


def test_tta_of_a_wrapped_dataset():
    inner = dict(type='CocoDataset', pipeline=[FLIP, PACK])
    loader = dict(dataset=dict(type='RepeatDataset', dataset=inner))
    cfg = Config(dict(model=dict(type='RetinaNet'), test_dataloader=loader))
    use_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module == dict(type='RetinaNet')
    pipeline = cfg.test_dataloader.dataset.dataset.pipeline
    assert pipeline[0] == FLIP
    assert pipeline[-1].type == 'TestTimeAug'


def test_tta_of_several_data_sets():
    first, second = (dict(type='CocoDataset', pipeline=[PACK]) for _ in range(2))
    second['pipeline'] = [FLIP, PACK]
    both = dict(type='ConcatDataset', datasets=[first, second])
    loaders = [dict(dataset=both), dict(dataset=dict(first))]
    cfg = Config(dict(model=dict(type='RetinaNet'), test_dataloader=loaders))
    use_tta(cfg)
    parts = cfg.test_dataloader[0].dataset.datasets
    assert [len(part.pipeline) for part in parts] == [1, 2]
    for dataset in (*parts, cfg.test_dataloader[1].dataset):
        assert dataset.pipeline[-1].type == 'TestTimeAug'


def test_tta_of_the_config():
    loader = dict(dataset=dict(type='CocoDataset', pipeline=[PACK]))
    cfg = Config(
        dict(
            model=dict(type='RetinaNet'),
            test_dataloader=loader,
            tta_model=dict(type='MyTTAModel'),
            tta_pipeline=[FLIP, PACK],
        )
    )
    use_tta(cfg)
    assert cfg.model == dict(type='MyTTAModel', module=dict(type='RetinaNet'))
    assert cfg.test_dataloader.dataset.pipeline == [FLIP, PACK]


MASKS = [
    dict(type='Mask2Former', panoptic_head=dict(type='Mask2FormerHead')),
    dict(type='SOLO', mask_head=dict(type='SOLOHead')),
    dict(type='MaskRCNN', roi_head=dict(mask_head=dict(type='FCNMaskHead'))),
    dict(type='CascadeRCNN', roi_head=dict(mask_head=[dict(type='FCNMaskHead')])),
]


@pytest.mark.parametrize('model', MASKS, ids=lambda model: model['type'])
def test_tta_of_masks_needs_a_model_that_merges_them(model):
    loader = dict(dataset=dict(type='CocoDataset', pipeline=[PACK]))
    settings = dict(model=model, test_dataloader=loader)
    cfg = Config(settings)
    with pytest.raises(ValueError, match=f'merges boxes and no masks.*{model["type"]}'):
        use_tta(cfg)
    assert cfg.model == model
    cfg = Config(dict(settings, tta_model=dict(type='MyTTAModel')))
    use_tta(cfg)
    assert cfg.model.type == 'MyTTAModel'


def test_tta_without_masks_in_a_two_stage_model():
    loader = dict(dataset=dict(type='CocoDataset', pipeline=[PACK]))
    model = dict(type='FasterRCNN', roi_head=dict(bbox_head=dict(), mask_head=None))
    cfg = Config(dict(model=model, test_dataloader=loader))
    use_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'


def test_tta_without_test_data():
    with pytest.raises(ValueError, match=r'--tta needs test_dataloader .* got None'):
        use_tta(Config(dict(model=dict(type='RetinaNet'))))
