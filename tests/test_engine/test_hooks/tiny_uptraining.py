"""A model with attention that trains in a moment, also as one of two processes."""

import sys
from pathlib import Path

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import Dataset

from deform_gqa.engine import use_safe_loading
from deform_gqa.models import DAT

ARCH = dict(
    embed_dims=(8,) * 4,
    depths=(1,) * 4,
    num_heads=(4,) * 4,
    block_types=('L', 'N', 'P', 'D'),
    offset_groups=(2,) * 4,
    table_sizes=(8,) * 4,
    neighborhood_sizes=(3,) * 4,
    window_sizes=(4,) * 4,
)


class Noise(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, 32, 64, generator=generator)
        return dict(inputs=image + 0.1 * torch.rand(()))


class TinyModel(BaseModel):
    def __init__(self, num_kv_heads: int | None = None) -> None:
        super().__init__()
        self.backbone = DAT(ARCH, num_kv_heads, out_indices=(3,))

    def forward(self, inputs: list[Tensor], mode: str = 'tensor'):
        [out] = self.backbone(torch.stack(inputs))
        if mode == 'loss':
            return dict(loss=(out - 1).square().mean())
        return [out.mean()]


class WeightsHook(Hook):
    """Keeps the weights that training starts with."""

    priority = 'VERY_LOW'

    def before_train(self, runner: Runner) -> None:
        model = getattr(runner.model, 'module', runner.model)
        self.start = {name: x.clone() for name, x in model.state_dict().items()}
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                state = hook.ema_model.module.state_dict()
                self.average = {name: x.clone() for name, x in state.items()}


def make_runner(
    work_dir: str | Path, num_kv_heads: int | None = 1, **options
) -> Runner:
    """Two epochs of two iterations."""
    use_safe_loading()
    options.setdefault('optim_wrapper', {})
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05))
    options['optim_wrapper'] = wrapper | options['optim_wrapper']
    options.setdefault('model', TinyModel(num_kv_heads=1))
    return Runner(
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=Noise(),
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        default_hooks=dict(
            checkpoint=dict(type='ResumableCheckpointHook', interval=1),
            logger=None,
        ),
        randomness=dict(seed=1),
        experiment_name=f'tiny_{id(options)}',
        default_scope='mmdet',
        log_level='WARNING',
        **options,
    )


def main(work_dir: str, checkpoint: str) -> None:
    """One process of several; saves what it starts and ends with."""
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    weights = WeightsHook()
    runner = make_runner(
        work_dir,
        load_from=checkpoint,
        launcher='pytorch',
        cfg=dict(
            model_wrapper_cfg=dict(
                type='MMDistributedDataParallel',
                device_ids=None,
                find_unused_parameters=True,
            )
        ),
        custom_hooks=[
            dict(type='GQAConversionHook', calibrate=2, refit_output=True),
            weights,
        ],
    )
    runner.train()
    end = runner.model.module.state_dict()
    torch.save(dict(start=weights.start, end=end), Path(work_dir, f'{rank}.pth'))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
