"""Draw a training: its curves, and predictions beside truths.

    python tools/draw_run.py WORK_DIR [--pictures DIR]

Writes ``training.png`` (losses, and the mAP of the validations) and, from the pictures
that ``tools/test.py --show-dir`` has drawn, ``predictions.png``.
"""

import argparse
import sys
from pathlib import Path

import cv2

from deform_gqa.visualization.run import draw_training, picture_panel


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('work_dir', type=Path, help='folder of the training')
    parser.add_argument('--pictures', type=Path, help='folder of drawn test images')
    parser.add_argument('--count', type=int, default=8, help='pictures in the panel')
    parser.add_argument('--out', type=Path, help='folder (default: WORK_DIR)')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    out = args.out or args.work_dir
    try:
        figure = draw_training(args.work_dir)
        panel = args.pictures and picture_panel(args.pictures, args.count)
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / 'training.png', dpi=120)
        print(out / 'training.png')
        if panel is not None:
            done, data = cv2.imencode('.png', panel)
            if not done:
                raise OSError(f'OpenCV cannot encode a panel of {panel.shape}')
            (out / 'predictions.png').write_bytes(data.tobytes())
            print(out / 'predictions.png')
    except (OSError, ValueError) as error:
        print(f'draw_run: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
