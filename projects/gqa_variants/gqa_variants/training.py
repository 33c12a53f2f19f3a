"""Trains, tests and measures one detector."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint
from torch import nn

from deform_gqa.engine.runner_utils import build_runner
from deform_gqa.profiling.memory import PeakMemory

CONFIG = Path(__file__).parents[1] / 'configs/retinanet_dat-gqa-mini_fpn_6e_bccd.py'
IMAGE_SIZE = (240, 320)
WARMUP_CALLS = 2
CALLS = 15
METRIC = 'coco/bbox_mAP'


def make_config(
    backbone: dict[str, Any], work_dir: Path, epochs: int | None = None, seed: int = 0
) -> Config:
    """The table's config with options of the backbone.

    Args:
        backbone: Options in the place of those of the config's backbone.
        work_dir: Folder of the checkpoints and logs.
        epochs: Length of the training; None for the config's.
        seed: Seed of weights and data.
    """
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.update(backbone)
    if epochs is not None:
        cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs + 1)
        cfg.param_scheduler[1].end = epochs
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
    cfg.launcher = 'none'
    cfg.randomness = dict(seed=seed)
    cfg.work_dir = str(work_dir)
    cfg.default_hooks.checkpoint = dict(type='ResumableCheckpointHook', interval=1)
    return cfg


def train_and_test(cfg: Config, split: str) -> float:
    """Trains, from the last checkpoint if there is one, and tests.

    Args:
        cfg: Of :func:`make_config`; its work folder holds the checkpoints.
        split: 'val' or 'test'.

    Returns:
        bbox mAP.
    """
    cfg = cfg.copy()
    checkpoint = find_latest_checkpoint(cfg.work_dir)
    if checkpoint is not None:
        cfg.resume, cfg.load_from = True, checkpoint
    if split == 'val':
        cfg.test_dataloader = cfg.val_dataloader
        cfg.test_evaluator = cfg.val_evaluator
    runner = build_runner(cfg)
    runner.train()
    # MMDetection reports no metrics where nothing is detected.
    return runner.test().get(METRIC, 0.0)


def latency_ms(cfg: Config) -> float:
    """CPU time of one thread for an image, from pixels to the head's maps."""
    detector = build_detector(cfg).eval()
    image = torch.randn(1, 3, *IMAGE_SIZE)
    with torch.no_grad():
        return _cpu_ms(lambda: detector(image, mode='tensor'))


def training_cost(cfg: Config) -> tuple[float, float | None]:
    """Of forward and backward for one image: CPU time of one thread, extra memory.

    Returns:
        Milliseconds, and the peak in MiB over the use before; None where the system
        does not tell it.
    """
    detector = build_detector(cfg).train()
    image = torch.randn(1, 3, *IMAGE_SIZE)

    def step() -> None:
        outs = detector(image, mode='tensor')
        sum(x.float().square().mean() for part in outs for x in part).backward()

    elapsed_ms = _cpu_ms(step)  # leaves the gradients of the parameters there
    with PeakMemory(torch.device('cpu')) as memory:
        step()
    return elapsed_ms, memory.extra_mib


def _cpu_ms(call: Callable[[], Any]) -> float:
    """Median CPU time of one thread.

    Unlike wall-clock time, it hardly depends on what else the machine does.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    samples = []
    for _ in range(WARMUP_CALLS + CALLS):
        start = time.process_time_ns()
        call()
        samples.append((time.process_time_ns() - start) / 1e6)
    torch.set_num_threads(threads)
    return statistics.median(samples[WARMUP_CALLS:])


def build_detector(cfg: Config) -> nn.Module:
    return MODELS.build(cfg.model)


def count_parameters(cfg: Config) -> int:
    """Of the backbone."""
    with torch.device('meta'):
        backbone = MODELS.build(cfg.model.backbone)
    return sum(parameter.numel() for parameter in backbone.parameters())
