"""How far the sampling points of a trained detector have moved from their start.

    PYTHONPATH=. python projects/multiview_deform_attn/offset_report.py \\
        CONFIG CHECKPOINT

For each per-query block, in pixels of its map, it prints how far the learnt base
offsets are from the ring on which they started, and how much the predicted part differs
from query to query (standard deviation over all queries of the validation images; 0.00
at the start).
"""

import argparse

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner

from deform_gqa.engine.checkpoint_io import load_checkpoint
from projects.multiview_deform_attn.multiview_deform_attn import (
    PerQueryDeformableAttention,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--images', type=int, default=16, help='validation images')
    args = parser.parse_args()

    register_all_modules()
    cfg = Config.fromfile(args.config)
    model = MODELS.build(cfg.model).eval()
    blocks = {
        name: block
        for name, block in model.named_modules()
        if isinstance(block, PerQueryDeformableAttention)
    }
    start = {name: block.base_offset.detach().clone() for name, block in blocks.items()}
    model.load_state_dict(load_checkpoint(args.checkpoint, 'cpu')['state_dict'])

    predicted = {name: [] for name in blocks}
    for name, block in blocks.items():
        block.conv_offset.register_forward_hook(
            lambda _module, _inputs, out, name=name: predicted[name].append(out)
        )
    cfg.val_dataloader.dataset.indices = args.images
    with torch.no_grad():
        for batch in Runner.build_dataloader(cfg.val_dataloader):
            model.backbone(model.data_preprocessor(batch)['inputs'])
    for name, block in blocks.items():
        moved = (block.base_offset - start[name]).norm(dim=-1).mean().item()
        spread = torch.cat(predicted[name]).std(dim=(0, 2, 3)).mean().item()
        print(
            f'{name}: base offsets moved {moved:.2f} px, queries differ {spread:.2f} px'
        )


if __name__ == '__main__':
    main()
