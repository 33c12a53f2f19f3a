"""Merge kv heads of a trained model: python tools/convert_checkpoint.py IN OUT ..."""

import argparse
import ast
import io
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from deform_gqa.conversion import ConversionReport, convert_checkpoint
from deform_gqa.conversion.checkpoint import adapt_names
from deform_gqa.conversion.grouping import GROUPINGS
from deform_gqa.conversion.merging import MERGES
from deform_gqa.engine import load_checkpoint
from deform_gqa.engine.calibration_data import calibration_batches
from deform_gqa.engine.checkpoint_io import AtomicLocalBackend
from deform_gqa.engine.runner_utils import check_has

# What a backbone of a detector has, and a classifier has not.
OUTPUT_NORMS = re.compile(r'norms\.\d+\.norm\.(weight|bias)')


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Merge the key/value heads of a trained model. If the checkpoint '
        'holds a backbone alone, as those of classifiers do, so does the new one.'
    )
    parser.add_argument('checkpoint', help='checkpoint of the trained model')
    parser.add_argument('out', help='file to be written, which must not exist')
    parser.add_argument(
        '--config', required=True, help="the detector's config; its kv heads may differ"
    )
    parser.add_argument(
        '--kv-heads',
        nargs='+',
        metavar='N',
        help='key/value heads: a number, a fraction of the query heads such as 1/4, or '
        'PATTERN=N for the modules in whose names the regular expression is found; '
        "the config's if left out",
    )
    parser.add_argument(
        '--grouping',
        default='adjacent',
        help=f'{", ".join(GROUPINGS)}, or lists of heads such as "[[0,2],[1,3]]"',
    )
    parser.add_argument('--merge', default='mean', choices=MERGES)
    parser.add_argument(
        '--calibrate',
        type=int,
        default=0,
        metavar='N',
        help="run the trained model on N of the config's training images",
    )
    parser.add_argument(
        '--refit-output',
        action='store_true',
        help='fit the output projections to those images',
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--report', metavar='DIR', help='folder for the report: JSON, table, picture'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='as in tools/train.py'
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Finds mistakes before anything is built or written.

    Raises:
        FileNotFoundError: There is no config.
        FileExistsError: The new file exists, or is the old one; or the report's folder
            is a file.
        ValueError: For a number out of range.
    """
    if not os.path.isfile(args.config):
        raise FileNotFoundError(f'config file {args.config!r} does not exist')
    if os.path.realpath(args.out) == os.path.realpath(args.checkpoint):
        raise FileExistsError(f'out {args.out!r} is the checkpoint that is read')
    check_out(args.out)
    if args.report is not None and not os.path.isdir(args.report):
        check_out(args.report, '--report')
    for name in ('calibrate', 'seed'):
        if getattr(args, name) < 0:
            raise ValueError(f'--{name} must be at least 0, got {getattr(args, name)}')


def check_out(out: str, name: str = 'out') -> None:
    if os.path.lexists(out):
        raise FileExistsError(f'{name} {out!r} exists')


def parse_kv_heads(values: list[str] | None) -> str | dict[str, str] | None:
    """--kv-heads as ``convert_state_dict`` takes it.

    Raises:
        ValueError: For several numbers without patterns.
    """
    if values is None:
        return None
    if len(values) == 1 and '=' not in values[0]:
        return values[0]
    if not all('=' in value for value in values):
        raise ValueError(f'--kv-heads must be one number, or PATTERN=N, got {values}')
    pairs = (value.rpartition('=') for value in values)
    return {pattern: number for pattern, _, number in pairs}


def parse_grouping(value: str) -> str | list:
    """--grouping: a name, or lists.

    Raises:
        ValueError: If it looks like lists but is not.
    """
    if not value.startswith('['):
        return value
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f'--grouping must be lists of heads, got {value!r}') from error


def load_config(args: argparse.Namespace) -> Config:
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    check_has(cfg, 'model', '--config')
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """The detector, with the weights that it would begin training with."""
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(cfg.model)


def choose_target(model: nn.Module, checkpoint: Mapping) -> nn.Module:
    """The part of the detector that a checkpoint is for: all of it, or its backbone."""
    backbone = getattr(model, 'backbone', None)
    if backbone is None:
        return model
    names = adapt_names(checkpoint, backbone)
    known = backbone.state_dict()
    return backbone if any(name in known for name in names) else model


def make_calibration(
    cfg: Config, model: nn.Module, target: nn.Module, args: argparse.Namespace
) -> Callable[[nn.Module], None] | None:
    """A function that runs a copy of the target on training images."""
    if not args.calibrate:
        return None
    if 'train_dataloader' not in cfg:
        raise ValueError(f'--calibrate needs a train_dataloader in {args.config!r}')
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)

    def run(trained: nn.Module) -> None:
        for batch in calibration_batches(dataset, args.calibrate, args.seed):
            if target is model:
                trained.test_step(batch)
            else:
                trained(model.data_preprocessor(batch)['inputs'])

    return run


def convert(
    args: argparse.Namespace, checkpoint: Mapping
) -> tuple[dict[str, Tensor], ConversionReport]:
    """The weights for the config's model, or its backbone, and the report.

    Raises:
        ValueError: For weights that do not fit, naming them.
    """
    cfg = load_config(args)
    model = build_model(cfg)
    target = choose_target(model, checkpoint)
    state, report = convert_checkpoint(
        checkpoint,
        target,
        parse_kv_heads(args.kv_heads),
        source=args.checkpoint,
        grouping=parse_grouping(args.grouping),
        merge=args.merge,
        calibration=make_calibration(cfg, model, target, args),
        refit_output=args.refit_output,
        seed=args.seed,
    )
    if not report.converted:
        raise ValueError(
            f'{args.checkpoint!r} has the wanted numbers of kv heads already'
        )
    complete(state, target, args.checkpoint)
    return state, report


def complete(state: dict[str, Tensor], target: nn.Module, source: str) -> None:
    """Adds the norms of a backbone's outputs, which classifiers lack.

    Raises:
        ValueError: If anything else is missing.
    """
    own = target.state_dict()
    missing = [name for name in own if name not in state]
    lacking = [name for name in missing if not OUTPUT_NORMS.fullmatch(name)]
    if lacking:
        raise ValueError(f'{source!r} lacks {len(lacking)} keys: {lacking[:5]}')
    state.update((name, own[name]) for name in missing)


def write(
    out: str,
    state: dict[str, Tensor],
    report: ConversionReport,
    meta: Mapping[str, Any],
) -> None:
    """Writes the new checkpoint completely or not at all."""
    buffer = io.BytesIO()
    meta = dict(meta, head_conversion=report.to_dict())
    torch.save(dict(state_dict=state, meta=meta), buffer)
    check_out(out)  # it may have been written in the meantime
    AtomicLocalBackend().put(buffer.getvalue(), out)


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        check_arguments(args)
        checkpoint = load_checkpoint(args.checkpoint, map_location='cpu')
        state, report = convert(args, checkpoint)
        write(args.out, state, report, checkpoint.get('meta') or {})
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(report)
    if args.report is not None:
        report.write(args.report)
    print(f'{args.out}: {len(state)} tensors')


if __name__ == '__main__':
    main()
