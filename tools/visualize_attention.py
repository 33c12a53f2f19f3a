"""Draw what a detector attends to in an image.

    python tools/visualize_attention.py CONFIG CHECKPOINT IMAGE --out DIR

Writes a picture for each deformable attention module: of DAT's deformable blocks the
reference grid, the offsets and the sampled points with their attention weights; of
Deformable DETR, DINO and their like the points that single queries read.
"""

import argparse
from pathlib import Path

import mmcv
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config, DictAction

from deform_gqa.engine import check_checkpoint
from deform_gqa.engine.checkpoint_io import use_safe_loading
from deform_gqa.visualization import draw_detections, record_attention


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('image', help='image file')
    parser.add_argument('--out', type=Path, default=Path('attention'), help='folder')
    parser.add_argument(
        '--queries',
        nargs='+',
        type=_point,
        metavar='X,Y',
        help='pixels of the image; the nearest query of each module is drawn (default: '
        'the centres of the best detections)',
    )
    parser.add_argument(
        '--modules',
        default='',
        metavar='PATTERN',
        help='regular expression that is searched for in the names of modules',
    )
    parser.add_argument('--heads', nargs='+', type=int, help='default: the first 8')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser, parser.parse_args()


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(','))
    except ValueError as error:
        message = f'must be X,Y in pixels, got {text!r}'
        raise argparse.ArgumentTypeError(message) from error
    return x, y


def check(args: argparse.Namespace) -> None:
    """Finds what is wrong with the options before a model is built.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the image or the checkpoint cannot be read, or a query lies
            outside of the image.
    """
    for name in ('config', 'checkpoint', 'image'):
        if not Path(getattr(args, name)).is_file():
            raise FileNotFoundError(f'{name} file {getattr(args, name)!r} not found')
    check_checkpoint(args.checkpoint)
    image = mmcv.imread(args.image)
    if image is None:
        raise ValueError(f'{args.image!r} is not an image that can be read')
    height, width = image.shape[:2]
    for x, y in args.queries or ():
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f'--queries must lie in the image of {width} x {height}, '
                f'got {x:g},{y:g}'
            )


def main() -> None:
    parser, args = parse_args()
    try:
        check(args)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    use_safe_loading()
    config = Config.fromfile(args.config)
    model = init_detector(
        config, args.checkpoint, device=args.device, cfg_options=args.cfg_options or {}
    )
    with record_attention(model, args.modules) as records:
        result = inference_detector(model, args.image)
    args.out.mkdir(parents=True, exist_ok=True)
    image = mmcv.imread(args.image, channel_order='rgb')
    for name, record in records.items():
        figure = draw_detections(image, record, result, args.queries, heads=args.heads)
        file = args.out / f'{name}.png'
        figure.savefig(file)
        print(f'written: {file}')


if __name__ == '__main__':
    main()
