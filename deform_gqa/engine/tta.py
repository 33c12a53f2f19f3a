"""Test-time augmentation for configs that were not written for it."""

from collections.abc import Iterator

from mmengine.config import Config

from deform_gqa.engine.runner_utils import check_has

__all__ = ['use_tta']


def use_tta(cfg: Config) -> None:
    """Tests on each image and its mirror image, unless the config says otherwise.

    Raises:
        ValueError: The config has no data to test on; or it has no ``tta_model``, and a
            detector with masks, which MMDetection's own model cannot merge.
    """
    check_has(cfg, 'test_dataloader', '--tta')
    if 'tta_model' not in cfg and _predicts_masks(cfg.model):
        raise ValueError(
            '--tta: DetTTAModel merges boxes and no masks; give a tta_model in the '
            f'config that can, or test without it (model {cfg.model.get("type")!r})'
        )
    cfg.setdefault(
        'tta_model',
        dict(
            type='DetTTAModel',
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        ),
    )
    loaders = cfg.test_dataloader
    for loader in [loaders] if isinstance(loaders, dict) else loaders:
        for dataset in _datasets_with_pipelines(loader.dataset):
            mirrored = [*dataset.pipeline[:-1], _mirror_transform()]
            dataset.pipeline = cfg.get('tta_pipeline', mirrored)
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def _datasets_with_pipelines(dataset: dict) -> Iterator[dict]:
    """Those within wrappers such as RepeatDataset and ConcatDataset."""
    if 'dataset' in dataset:
        yield from _datasets_with_pipelines(dataset.dataset)
    elif 'datasets' in dataset:
        for part in dataset.datasets:
            yield from _datasets_with_pipelines(part)
    else:
        yield dataset


def _predicts_masks(model: dict) -> bool:
    """Whether a model's config has a mask head, at any depth."""
    return any(
        (name in ('mask_head', 'panoptic_head') and value is not None)
        or (isinstance(value, dict) and _predicts_masks(value))
        for name, value in model.items()
    )


def _mirror_transform() -> dict:
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    pack = dict(type='PackDetInputs', meta_keys=(*keys, 'flip', 'flip_direction'))
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    return dict(type='TestTimeAug', transforms=[flips, [pack]])
