"""A training whose parts nap for times that are known, on a virtual clock."""

import itertools

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset
from virtual_time import CLOCK, Nap

_NUMBERS = itertools.count()
BATCH_SIZE = 2


class NapAttention(nn.Module):
    def __init__(self, forward_ms: float, backward_ms: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.forward_ms, self.backward_ms = forward_ms, backward_ms

    def forward(self, x):
        return Nap.apply(self.linear(x), self.forward_ms, self.backward_ms)


class NapPreprocessor(BaseDataPreprocessor):
    def __init__(self, nap_ms: float) -> None:
        super().__init__()
        self.nap_ms = nap_ms

    def forward(self, data, training=False):
        CLOCK.nap(self.nap_ms)
        return super().forward(data, training)


class NapModel(BaseModel):
    """Keeps its losses, and what is installed on it while it runs."""

    def __init__(self, preprocess=0.0, forward=0.0, backward=0.0) -> None:
        super().__init__(NapPreprocessor(preprocess))
        self.attention = NapAttention(forward, backward)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 1)
        self.losses = []
        self.hooked = []

    def forward(self, inputs, mode='tensor'):
        self.hooked.append(bool(self.attention._forward_hooks))
        out = self.head(self.dropout(self.attention(torch.stack(inputs))))
        if mode == 'loss':
            loss = (out - 1).square().mean()
            self.losses.append(loss.item())
            return dict(loss=loss)
        return [out.mean()]


class NapSGD(torch.optim.SGD):
    def __init__(self, params, nap_ms=0.0, **kwargs) -> None:
        super().__init__(params, **kwargs)
        self.nap_ms = nap_ms

    def step(self, closure=None):
        CLOCK.nap(self.nap_ms)
        return super().step(closure)


class Items(Dataset):
    def __init__(self, nap_ms: float, batches: int = 3) -> None:
        self.nap_ms, self.batches = nap_ms, batches

    def __len__(self) -> int:
        return self.batches * BATCH_SIZE

    def __getitem__(self, index: int) -> dict:
        CLOCK.nap(self.nap_ms / BATCH_SIZE)
        return dict(inputs=torch.full((4,), index / 6))


class NapMetric(BaseMetric):
    def __init__(self, nap_ms: float) -> None:
        super().__init__()
        self.nap_ms = nap_ms

    def process(self, data_batch, data_samples) -> None:
        CLOCK.nap(self.nap_ms)
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict:
        return dict(score=0.0)


class NapHook(Hook):
    def __init__(self, nap_ms: float) -> None:
        self.nap_ms = nap_ms

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        CLOCK.nap(self.nap_ms)


def make_runner(
    work_dir,
    naps: dict | None = None,
    hooks: tuple = (),
    loop: dict | None = None,
    optim: dict | None = None,
    model: nn.Module | None = None,
    batches: int = 3,
    **benchmark,
) -> Runner:
    """Four epochs of three iterations, a validation of as many after each.

    Args:
        naps: ms of sleep by the name of a phase.
        hooks: Further hooks.
        loop: ``train_cfg``.
        optim: Options of the optimizer wrapper.
        batches: Batches of an epoch.
        model: Instead of the model with naps.
        benchmark: Options of the hook under test; ``benchmark=None`` leaves it out.
    """
    naps = {} if naps is None else naps
    options = dict(interval=3, eval_interval=2, warmup_iters=2) | benchmark
    ours = (
        [] if 'benchmark' in options else [dict(options, type='RuntimeBenchmarkHook')]
    )
    torch.manual_seed(0)
    if model is None:
        names = ('preprocess', 'forward', 'backward')
        model = NapModel(**{name: naps.get(name, 0.0) for name in names})
    optimizer = dict(type=NapSGD, lr=0.1, nap_ms=naps.get('optimizer', 0.0))

    def loader() -> dict:
        return dict(
            batch_size=BATCH_SIZE,
            num_workers=0,
            dataset=Items(naps.get('data', 0.0), batches),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        )

    metrics = [NapMetric(naps.get('evaluator', 0.0))]
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader(),
        val_dataloader=loader(),
        test_dataloader=loader(),
        train_cfg=dict(by_epoch=True, max_epochs=4) if loop is None else loop,
        val_cfg=dict(),
        test_cfg=dict(),
        val_evaluator=metrics,
        test_evaluator=metrics,
        optim_wrapper=dict(optimizer=optimizer, **({} if optim is None else optim)),
        default_hooks=dict(checkpoint=None),
        custom_hooks=[NapHook(naps.get('hooks', 0.0)), *hooks, *ours],
        randomness=dict(seed=3),
        # Runs of one name and second would share their message hub.
        experiment_name=f'napping_{next(_NUMBERS)}',
        log_level='ERROR',
    )
