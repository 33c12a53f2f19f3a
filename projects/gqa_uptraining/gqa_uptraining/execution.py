"""Runs a row: converts, trains and tests a detector."""

import copy
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor, nn

from deform_gqa.conversion import convert_state_dict
from deform_gqa.datasets.coco import write_json
from deform_gqa.engine.checkpoint_io import load_checkpoint
from deform_gqa.engine.runner_utils import build_runner
from deform_gqa.profiling.environment import git_commit, package_version

from .rows import BASE_ITERS, DISTILLED, KV_HEADS, Row

CONFIGS = Path(__file__).parents[1] / 'configs'
BASE_CONFIG = CONFIGS / 'retinanet_dat-mha-mini_fpn_bccd.py'
UPTRAINING_CONFIG = CONFIGS / 'retinanet_dat-mqa-mini_fpn_bccd-uptrain.py'
SCRATCH_WARMUP_ITERS = 100  # as the base's
SCRATCH_LR = 1e-3
CALIBRATION_IMAGES = 32
ERROR_IMAGES = 32


class Experiment:
    """Where the rows of an experiment are run and what they leave.

    Args:
        work_dir: Folder of checkpoints and logs.
        results: Folder of one JSON file for each row.
    """

    def __init__(self, work_dir: Path, results: Path) -> None:
        self.work_dir, self.results = work_dir, results

    # What there is

    def result_file(self, row: Row, split: str = 'test') -> Path:
        if split == 'val':
            return self.results / 'selection' / f'{row.training}.json'
        return self.results / f'{row.name}.json'

    def folder(self, row: Row) -> Path:
        name = 'base' if row.method == 'multi-head' else row.training
        return self.work_dir / f'seed{row.seed}' / name

    def checkpoint(self, row: Row) -> Path:
        """The file that is tested."""
        if row.method == 'multi-head':
            return self.folder(row) / 'epoch_24.pth'
        if row.iters == 0:
            return self._converted_file(row)
        return self.folder(row) / f'iter_{row.iters}.pth'

    def _converted_file(self, row: Row) -> Path:
        name = f'converted_{row.kv_heads}_{row.merge}.pth'
        return self.work_dir / f'seed{row.seed}' / name

    def is_ready(self, row: Row) -> bool:
        """Whether the detector that the row converts is there."""
        return row.base is None or self.checkpoint(row.base).exists()

    # Running

    def run(self, row: Row, split: str = 'test') -> None:
        """Does what is left to do of a row, and writes its result.

        Args:
            split: 'test', or 'val' for a row that serves a choice.
        """
        if row.base is not None and not self._converted_file(row).exists():
            self._convert(row)
        if row.iters and not self.checkpoint(row).exists():
            self._train(row)
        cfg = self.config(row)
        result = dict(
            seed=row.seed,
            kv_heads=row.kv_heads,
            kv_heads_per_stage=cfg.model.backbone.num_kv_heads,
            method=row.method,
            alpha=row.alpha,
            base_iters=BASE_ITERS if row.base is not None else 0,
            iters=row.iters,
            lr=cfg.optim_wrapper.optimizer.lr if row.iters else None,
            distillation_weight=row.weight if row.method == DISTILLED else None,
            split=split,
            metrics=self._evaluate(row, split),
            commit=git_commit(),
            torch=package_version('torch'),
        )
        if row.base is not None and row.iters == 0:
            result['layers'] = self._describe_conversion(row)
        file = self.result_file(row, split)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)

    def config(self, row: Row) -> Config:
        """The config of a row's training and test."""
        if row.method == 'multi-head':
            cfg = _load_config(BASE_CONFIG)
        else:
            cfg = _load_config(UPTRAINING_CONFIG)
            cfg.model.backbone.num_kv_heads = KV_HEADS[row.kv_heads]
            self._set_schedule(cfg, row)
            self._set_start(cfg, row)
        for split in ('train', 'val', 'test'):
            # one process a row, so that several can share a machine
            cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
        cfg.launcher = 'none'
        cfg.randomness = dict(seed=row.seed)
        cfg.work_dir = str(self.folder(row))
        cfg.experiment_name = row.name
        cfg.default_hooks.checkpoint.type = 'ResumableCheckpointHook'
        return cfg

    def _set_schedule(self, cfg: Config, row: Row) -> None:
        scratch = row.method == 'scratch'
        # mmengine's LinearLR of one iteration would stay at its start factor
        warmup = SCRATCH_WARMUP_ITERS if scratch else max(2, row.iters // 10)
        cfg.optim_wrapper.optimizer.lr = SCRATCH_LR if scratch else row.lr
        cfg.param_scheduler[0].end = warmup
        cfg.param_scheduler[1].end = row.iters
        cfg.train_cfg.max_iters = row.iters
        cfg.train_cfg.val_interval = row.iters + 1  # tested apart

    def _set_start(self, cfg: Config, row: Row) -> None:
        """The weights are converted beforehand, once for all alphas."""
        cfg.custom_hooks = [
            hook for hook in cfg.custom_hooks if hook.type != 'GQAConversionHook'
        ]
        cfg.load_from = None if row.base is None else str(self._converted_file(row))
        if row.method == DISTILLED:
            cfg.custom_hooks.append(
                dict(
                    type='AttentionDistillationHook',
                    teacher_config=str(BASE_CONFIG),
                    teacher_ckpt=str(self.checkpoint(row.base)),
                    loss_weight=row.weight,
                )
            )

    def _convert(self, row: Row) -> None:
        merge, _, refit = row.merge.partition('+')
        base = self.config(row.base)
        images = list(_images(base, 'train', CALIBRATION_IMAGES)) if refit else None
        state = load_checkpoint(self.checkpoint(row.base), 'cpu')['state_dict']
        converted, report = convert_state_dict(
            state,
            build_detector(self.config(row)),
            merge=merge,
            calibration=images and (lambda model: [model.backbone(x) for x in images]),
            refit_output=bool(refit),
            seed=row.seed,
        )
        file = self._converted_file(row)
        write_json(file.with_suffix('.json'), report.to_dict())
        # another process may convert for another row at the same time
        part = file.with_suffix(f'.part-{os.getpid()}')
        torch.save(dict(state_dict=converted), part)
        part.replace(file)

    def _train(self, row: Row) -> None:
        cfg = self.config(row)
        resumed = find_latest_checkpoint(cfg.work_dir)
        if resumed is not None:
            cfg.resume, cfg.load_from = True, resumed
        build_runner(cfg).train()

    def _evaluate(self, row: Row, split: str) -> dict[str, float]:
        cfg = self.config(row)
        cfg.load_from = str(self.checkpoint(row))
        cfg.custom_hooks = []
        cfg.experiment_name = f'{row.name}_{split}'
        if split == 'val':
            cfg.test_dataloader, cfg.test_evaluator = (
                cfg.val_dataloader,
                cfg.val_evaluator,
            )
        metrics = build_runner(cfg).test()
        return {name.removeprefix('coco/'): value for name, value in metrics.items()}

    # Errors of a conversion

    def _describe_conversion(self, row: Row) -> dict[str, dict]:
        """By attention block: kv heads, sizes before and after, output error."""
        report = json.loads(self._converted_file(row).with_suffix('.json').read_text())
        errors = self.output_errors(row)
        keys = ('num_heads', 'kv_heads', 'kv_params', 'kv_bytes')
        return {
            layer['name']: {
                **{key: layer[key] for key in keys},
                'output_error': errors[layer['name']],
            }
            for layer in report['layers']
        }

    def output_errors(self, row: Row) -> dict[str, float]:
        """Relative output error of each attention block, on validation images.

        Each block gets what the multi-head detector's gets, so that the error is its
        own: the norm of the difference over the norm of the multi-head output.
        """
        multi_head = self.detector(row.base)
        grouped = dict(self.detector(row).named_modules())
        squares = {}

        def compare(name: str):
            def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
                error = (grouped[name](*args) - output).square().sum().item()
                sums = squares.setdefault(name, [0.0, 0.0])
                sums[0] += error
                sums[1] += output.square().sum().item()

            return hook

        for name, module in multi_head.named_modules():
            if hasattr(module, 'num_kv_heads'):
                module.register_forward_hook(compare(name))
        with torch.no_grad():
            for images in _images(self.config(row.base), 'val', ERROR_IMAGES):
                multi_head.backbone(images)
        return {name: (error / norm) ** 0.5 for name, (error, norm) in squares.items()}

    def detector(self, row: Row) -> nn.Module:
        """The row's detector in eval mode."""
        model = build_detector(self.config(row))
        state = load_checkpoint(self.checkpoint(row), 'cpu')['state_dict']
        model.load_state_dict(state)
        return model.eval()


def _load_config(path: Path) -> Config:
    return copy.deepcopy(_load_config_once(path))


@functools.cache
def _load_config_once(path: Path) -> Config:
    """Bases of MMDetection take a second to find."""
    return Config.fromfile(path)


def build_detector(cfg: Config) -> nn.Module:
    return MODELS.build(cfg.model)


def _images(cfg: Config, split: str, count: int) -> Iterator[Tensor]:
    """Batches of normalised images, the first ``count`` of a split."""
    loader: dict[str, Any] = dict(cfg.val_dataloader)
    dataset = dict(loader['dataset'], indices=count)
    dataset['ann_file'] = cfg[f'{split}_dataloader'].dataset.ann_file
    preprocess = build_detector(cfg).data_preprocessor
    for batch in Runner.build_dataloader(dict(loader, dataset=dataset)):
        yield preprocess(batch)['inputs']
