"""Generate the synthetic shapes dataset (COCO JSON with boxes and masks).

Example:
    python tools/dataset_converters/make_shapes.py --out-dir data/shapes

A second run with the same parameters finds the dataset and does nothing. How images
are drawn and annotated is described in ``deform_gqa.datasets.shapes``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from deform_gqa.datasets.shapes import generate_dataset
from deform_gqa.datasets.shapes_config import SPLITS, ShapesConfig


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (``sys.argv`` by default)."""
    defaults = ShapesConfig()
    parser = argparse.ArgumentParser(
        description='Generate the synthetic shapes dataset (COCO JSON).',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--out-dir', type=Path, default=Path('data/shapes'), help='dataset folder')
    add('--num-train', type=int, default=defaults.num_train, help='training images')
    add('--num-val', type=int, default=defaults.num_val, help='validation images')
    add('--num-test', type=int, default=defaults.num_test, help='test images')
    add(
        '--image-size',
        type=int,
        nargs='+',
        default=list(defaults.image_size),
        metavar='PIXELS',
        help='width and height, or one number for square images',
    )
    add('--seed', type=int, default=defaults.seed, help='same seed, same files')
    add('--min-objects', type=int, default=defaults.min_objects, help='a picture')
    add('--max-objects', type=int, default=defaults.max_objects, help='a picture')
    add(
        '--min-visible',
        type=float,
        default=defaults.min_visible,
        help='smallest visible share of a shape, in (0, 1]',
    )
    add('--workers', type=int, default=1, help='processes; the files do not change')
    add('--overwrite', action='store_true', help='replace a dataset made otherwise')
    return parser.parse_args(argv)


def make_config(args: argparse.Namespace) -> ShapesConfig:
    """The generator's parameters from the command line; see ``ShapesConfig``."""
    if len(args.image_size) > 2:
        raise ValueError(f'--image-size takes one or two numbers: {args.image_size}')
    return ShapesConfig(
        num_train=args.num_train,
        num_val=args.num_val,
        num_test=args.num_test,
        image_size=(args.image_size[0], args.image_size[-1]),
        seed=args.seed,
        min_objects=args.min_objects,
        max_objects=args.max_objects,
        min_visible=args.min_visible,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after an error."""
    args = parse_args(argv)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        config = make_config(args)
        with Progress(
            '{task.description}', *columns, console=Console(stderr=True)
        ) as progress:
            total = sum(config.num_images(split) for split in SPLITS)
            task = progress.add_task('images', total=total, visible=False)

            def advance() -> None:
                progress.update(task, advance=1, visible=True)

            written = generate_dataset(
                config,
                args.out_dir,
                workers=args.workers,
                overwrite=args.overwrite,
                on_image=advance,
            )
    except (OSError, TypeError, ValueError) as error:
        print(f'make_shapes: error: {error}', file=sys.stderr)
        return 2
    if not written:
        print(f'{args.out_dir}: already there, nothing to do')
        return 0
    print(
        f'{args.out_dir}: {config.num_train} training, {config.num_val} validation and '
        f'{config.num_test} test images, {config.image_size[0]}x{config.image_size[1]}'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
