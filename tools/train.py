"""Train a detector: python tools/train.py CONFIG."""

import argparse

from deform_gqa.engine.resuming import choose_start, use_resumable_training
from deform_gqa.engine.runner_utils import (
    add_common_arguments,
    build_runner,
    check_common_arguments,
    leave_process_group,
    load_config,
    use_amp,
    use_auto_scale_lr,
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Train a detector')
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--amp',
        action='store_true',
        help='mixed precision: float16 on a GPU, bfloat16 on the CPU',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the total batch size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from this checkpoint or, without a value, from the newest one in '
        'the work folder if there is one',
    )
    add_common_arguments(parser)
    return parser


def set_up(args: argparse.Namespace):
    """The config with the options of the command line, all of them checked."""
    check_common_arguments(args)
    cfg = load_config(args)
    use_resumable_training(cfg)
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        use_auto_scale_lr(cfg)
    choose_start(cfg, args.resume)
    return cfg


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        cfg = set_up(args)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    build_runner(cfg).train()
    leave_process_group()


if __name__ == '__main__':
    main()
