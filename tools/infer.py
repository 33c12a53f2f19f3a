"""Detect objects in an image, a folder of images, a video or the stream of a webcam.

    python tools/infer.py CONFIG CHECKPOINT photo.jpg --out DIR
    python tools/infer.py CONFIG CHECKPOINT photos/ --out DIR --slice-size 1024
    python tools/infer.py CONFIG CHECKPOINT film.mp4 --out DIR
    python tools/infer.py CONFIG CHECKPOINT 0 --show        # webcam 0; q ends it

Of images, DIR/vis holds pictures and DIR/preds a JSON file each, as mmdet's
DetInferencer writes them; of a video, DIR holds a video and a file with a line of JSON
for each frame.
"""

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import mmcv
import mmengine
import numpy as np
from mmdet.apis.det_inferencer import IMG_EXTENSIONS
from mmdet.structures import DetDataSample
from mmengine.config import DictAction
from rich.progress import track

from deform_gqa.engine import check_checkpoint
from deform_gqa.engine.checkpoint_io import use_safe_loading
from deform_gqa.engine.detector_files import CheckedInferencer, find_config
from deform_gqa.engine.slicing import detect_in_slices, slice_windows

VIDEO_EXTENSIONS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')
DEFAULT_FPS = 25.0  # of a webcam that does not tell
END_KEYS = (ord('q'), 27)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file, or the name of one')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    parser.add_argument(
        'source', help='image, folder of images, video file or number of a webcam'
    )
    parser.add_argument('--out', type=Path, help='folder (default: predictions)')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='least score that is drawn'
    )
    parser.add_argument(
        '--slice-size',
        type=int,
        metavar='PIXELS',
        help='cut larger images into windows of this side, for small objects',
    )
    parser.add_argument(
        '--slice-overlap',
        type=int,
        metavar='PIXELS',
        help='what windows share; more than most objects measure (default: a quarter '
        'of the windows)',
    )
    parser.add_argument(
        '--slice-iou',
        type=float,
        default=0.5,
        help='boxes of different windows with a larger IoU are one object',
    )
    parser.add_argument('--batch-size', type=int, default=1, help='windows at a time')
    parser.add_argument(
        '--show', action='store_true', help='show frames of a video or webcam'
    )
    parser.add_argument(
        '--max-frames', type=int, help='end a video or webcam after so many frames'
    )
    parser.add_argument('--device', help='default: a GPU where there is one')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError before anything is loaded."""
    if args.slice_size is not None:
        if args.slice_overlap is None:
            args.slice_overlap = args.slice_size // 4
        slice_windows((1, 1), args.slice_size, args.slice_overlap)
    if not 0 < args.slice_iou <= 1:
        raise ValueError(f'--slice-iou must be in (0, 1], got {args.slice_iou}')
    for name in ('batch_size', 'max_frames'):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = f'--{name.replace("_", "-")}'
            raise ValueError(f'{option} must be at least 1, got {value}')
    if args.out is None:
        args.out = Path('predictions')
    check_checkpoint(args.checkpoint)


def open_source(source: str) -> list[Path] | cv2.VideoCapture:
    """The images of a source, or an opened video or webcam.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If a folder holds no images, or the image, the video or the webcam
            cannot be read.
    """
    path = Path(source)
    if source.isdigit() and not path.exists():
        return _open_video(int(source), f'webcam {source}')
    if not path.exists():
        raise FileNotFoundError(f'image, folder or video {source!r} not found')
    if path.is_dir():
        images = sorted(x for x in path.iterdir() if x.suffix.lower() in IMG_EXTENSIONS)
        if not images:
            raise ValueError(
                f'folder {source!r} holds no images ({", ".join(IMG_EXTENSIONS)})'
            )
        return images
    if path.suffix.lower() in VIDEO_EXTENSIONS:
        return _open_video(source, f'video {source!r}')
    if mmcv.imread(source) is None:
        raise ValueError(f'{source!r} is not an image that can be read')
    return [path]


def _open_video(source: str | int, name: str) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        raise ValueError(f'{name} cannot be opened')
    return capture


class Predictor:
    """Detects in one image, as a whole or by windows."""

    def __init__(self, inferencer: CheckedInferencer, args: argparse.Namespace):
        self.inferencer = inferencer
        self.args = args

    def detect(self, images: list[np.ndarray]) -> list[DetDataSample]:
        """Detections in images (H, W, 3) of uint8, BGR, on the CPU."""
        found = self.inferencer(
            images,
            batch_size=self.args.batch_size,
            return_datasamples=True,
            no_save_vis=True,
        )
        return [sample.cpu() for sample in found['predictions']]

    def __call__(self, image: np.ndarray) -> DetDataSample:
        side = self.args.slice_size
        if side is None or max(image.shape[:2]) <= side:
            return self.detect([image])[0]
        instances = detect_in_slices(
            image,
            lambda crops: [sample.pred_instances for sample in self.detect(crops)],
            side,
            self.args.slice_overlap,
            self.args.slice_iou,
        )
        size = image.shape[:2]
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        sample.pred_instances = instances
        return sample

    def draw(self, image: np.ndarray, sample: DetDataSample) -> np.ndarray:
        """The image with its detections, BGR."""
        visualizer = self.inferencer.visualizer
        visualizer.add_datasample(
            'image',
            image[..., ::-1].copy(),
            sample,
            draw_gt=False,
            pred_score_thr=self.args.score_thr,
        )
        return visualizer.get_image()[..., ::-1].copy()


def infer_images(predict: Predictor, images: list[Path], out: Path) -> list[Path]:
    """Writes a picture and a JSON file for each image; returns those it cannot read."""
    unreadable = []
    stems = Counter(path.stem for path in images)
    for path in track(images, description='Inference'):
        image = mmcv.imread(str(path))
        if image is None:
            print(f'skipped: {path} is not an image that can be read', flush=True)
            unreadable.append(path)
            continue
        sample = predict(image)
        name = path.stem if stems[path.stem] == 1 else path.name
        mmengine.dump(
            predict.inferencer.pred2dict(sample), out / 'preds' / f'{name}.json'
        )
        mmcv.imwrite(predict.draw(image, sample), str(out / 'vis' / path.name))
    return unreadable


def infer_video(
    predict: Predictor,
    capture: cv2.VideoCapture,
    out: Path,
    name: str,
    show: bool,
    max_frames: int | None,
) -> int:
    """Writes each frame as soon as it is done; returns how many there were."""
    out.mkdir(parents=True, exist_ok=True)
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    frames = _frames(capture, max_frames)
    count, writer = 0, None
    with contextlib.ExitStack() as stack:
        stack.callback(capture.release)
        lines = stack.enter_context(open(out / f'{name}.jsonl', 'w', encoding='utf-8'))
        for frame in track(frames, 'Inference', total=total if total > 0 else None):
            sample = predict(frame)
            picture = predict.draw(frame, sample)
            if writer is None:
                writer = _open_writer(out / f'{name}.mp4', capture, frame)
                stack.callback(writer.release)
            writer.write(picture)
            lines.write(json.dumps(predict.inferencer.pred2dict(sample)) + '\n')
            lines.flush()
            count += 1
            if show:
                cv2.imshow(name, picture)
                if cv2.waitKey(1) & 0xFF in END_KEYS:
                    break
    return count


def _frames(capture: cv2.VideoCapture, most: int | None) -> Iterator[np.ndarray]:
    count = 0
    while most is None or count < most:
        is_read, frame = capture.read()
        if not is_read:
            return
        yield frame
        count += 1


def _open_writer(
    path: Path, capture: cv2.VideoCapture, frame: np.ndarray
) -> cv2.VideoWriter:
    rate = capture.get(cv2.CAP_PROP_FPS)
    size = frame.shape[1], frame.shape[0]
    writer = cv2.VideoWriter(
        str(path),
        cv2.VideoWriter_fourcc(*'mp4v'),
        rate if rate > 0 else DEFAULT_FPS,
        size,
    )
    if not writer.isOpened():
        raise ValueError(f'video {str(path)!r} cannot be written')
    return writer


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        check_options(args)
        source = open_source(args.source)
        config = find_config(args.config)
        if args.cfg_options:
            config.merge_from_dict(args.cfg_options)
        use_safe_loading()
        inferencer = CheckedInferencer(
            config, args.checkpoint, device=args.device, show_progress=False
        )
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    predict = Predictor(inferencer, args)
    if isinstance(source, list):
        unreadable = infer_images(predict, source, args.out)
        print(f'written: {args.out}/vis and {args.out}/preds')
        if unreadable:
            parser.exit(1, f'{len(unreadable)} of {len(source)} images were skipped\n')
        return
    name = f'webcam{args.source}' if args.source.isdigit() else Path(args.source).stem
    try:
        count = infer_video(predict, source, args.out, name, args.show, args.max_frames)
    except KeyboardInterrupt:  # how one leaves a webcam; all frames are written
        print('interrupted')
        return
    if count == 0:
        parser.exit(1, f'{args.source!r} holds no frame that can be read\n')
    print(f'written: {count} frames, {args.out / name}.mp4 and .jsonl')


if __name__ == '__main__':
    main()
