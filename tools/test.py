"""Test a detector: python tools/test.py CONFIG CHECKPOINT."""

import argparse

from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults

from deform_gqa.engine import check_checkpoint
from deform_gqa.engine.runner_utils import (
    add_common_arguments,
    build_runner,
    check_common_arguments,
    leave_process_group,
    load_config,
)
from deform_gqa.engine.tta import use_tta


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Test a detector')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    parser.add_argument('--out', help='file for the predictions, .pkl or .pickle')
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument(
        '--show-dir',
        help='folder for pictures of the predictions, inside WORK_DIR/TIMESTAMP',
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds each picture is shown'
    )
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    add_common_arguments(parser)
    return parser


def set_up(args: argparse.Namespace):
    """The config with the options of the command line, all of them checked."""
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out must end with .pkl or .pickle, got {args.out!r}')
    check_common_arguments(args)
    check_checkpoint(args.checkpoint)
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        cfg = trigger_visualization_hook(cfg, args)
    if args.tta:
        use_tta(cfg)
    return cfg


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        cfg = set_up(args)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    runner = build_runner(cfg)
    if args.out is not None:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()
    leave_process_group()


if __name__ == '__main__':
    main()
