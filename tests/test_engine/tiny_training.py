"""A training of a second that draws from every random stream, as a script.

Dropout draws in the main process, the data set draws with torch, NumPy and Python
wherever its items are made, and the sampler shuffles.
"""

import argparse
import itertools
import os
import random
import signal
from typing import ClassVar

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from deform_gqa.engine import use_safe_loading

_NUMBERS = itertools.count()


class Points(Dataset):
    """Points with noise from each of the three generators, if any."""

    loaded: ClassVar[list[int]] = []  # by this process, since it began

    def __init__(self, noise: bool = True) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict:
        self.loaded.append(index)
        noise = 0.0
        if self.noise:
            noise = random.random() + np.random.rand() + torch.rand(()).item()
        return dict(inputs=torch.full((4,), index + noise))


class TinyModel(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, inputs: list, mode: str = 'tensor'):
        out = self.layers(torch.stack(inputs) / 12)
        if mode == 'loss':
            return dict(loss=(out - 1).square().mean())
        return [out.mean()]


class Scores(BaseMetric):
    """Gives the given scores, one for each epoch."""

    default_prefix = ''

    def __init__(self, scores: tuple[float, ...]) -> None:
        super().__init__()
        self.scores = scores

    def process(self, data_batch, data_samples) -> None:
        torch.rand(())  # as a validation may that draws
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict:
        epoch = MessageHub.get_current_instance().get_info('epoch')
        score = self.scores[epoch]
        return dict(score=score, loss_score=(score - 0.25) ** 2)


class KillHook(Hook):
    """Ends the process as a power cut would, before the given iteration ends."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner, **kwargs) -> None:
        if runner.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)


class PowerCutError(Exception):
    """Stands for the end of a process whose memory the test goes on to use."""


class CutHook(Hook):
    """Raises at the n-th call of one of its methods; the first has the number 1."""

    priority = 'VERY_HIGH'

    def __init__(self, method: str, number: int) -> None:
        self.calls = itertools.count(1)

        def cut(runner, **kwargs) -> None:
            if next(self.calls) == number:
                raise PowerCutError

        setattr(self, method, cut)


def make_runner(
    work_dir: str,
    *,
    resume: bool = False,
    kill_at: int | None = None,
    noise: bool = True,
    workers: int = 0,
    persistent_workers: bool = False,
    seed: int | None = 3,
    scores: tuple[float, ...] = (0.1, 0.5, 0.2, 0.4),
    loop: dict | None = None,
    sampler: str = 'DefaultSampler',
    scheduler: dict | None = None,
    optim: dict | None = None,
    hooks: tuple[Hook, ...] = (),
    runner_type: type = Runner,
    **checkpoint,
) -> Runner:
    """Four epochs of three iterations, with a validation after each."""

    def loader(sampler: str, shuffle: bool) -> dict:
        return dict(
            batch_size=4,
            num_workers=workers,
            persistent_workers=persistent_workers,
            dataset=Points(noise),
            sampler=dict(type=sampler, shuffle=shuffle),
            collate_fn=dict(type='pseudo_collate'),
        )

    hook = dict(
        type='ResumableCheckpointHook', interval=1, save_best='score', rule='greater'
    )
    hook.update(checkpoint)
    if scheduler is None:
        scheduler = dict(type='ExponentialLR', gamma=0.9)
    torch.manual_seed(0)  # the model is made before the runner seeds
    return runner_type(
        model=TinyModel(),
        work_dir=work_dir,
        train_dataloader=loader(sampler, shuffle=True),
        val_dataloader=loader('DefaultSampler', shuffle=False),
        train_cfg=dict(by_epoch=True, max_epochs=4) if loop is None else loop,
        val_cfg=dict(),
        val_evaluator=[Scores(scores)],
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.01), **(optim or {})),
        param_scheduler=scheduler,
        default_hooks=dict(checkpoint=hook),
        custom_hooks=[*hooks, *([] if kill_at is None else [KillHook(kill_at)])],
        randomness=dict(seed=seed),
        resume=resume,
        # Runs of one name and second would share their message hub.
        experiment_name=f'tiny_{next(_NUMBERS)}',
        log_level='ERROR',
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('work_dir')
    parser.add_argument('--resume', action='store_true')
    parser.add_argument('--kill-at', type=int)
    parser.add_argument('--workers', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    use_safe_loading()
    make_runner(persistent_workers=args.workers > 0, **vars(args)).train()


if __name__ == '__main__':
    main()
