"""What an exported graph computes beside the model that it was made from."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

MAP_TOLERANCE = 1e-4
BOX_TOLERANCE = 1e-3  # pixels
SCORE_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference of an output at one size, and what is allowed.

    ``unmatched`` counts detections that only one of the two sides has.
    """

    size: tuple[int, int]
    output: str
    largest: float
    allowed: float
    unmatched: int = 0

    @property
    def is_within(self) -> bool:
        return self.largest <= self.allowed and self.unmatched == 0

    def __str__(self) -> str:
        height, width = self.size
        text = (
            f'{height} x {width}, {self.output}: differs by {self.largest:.2g} '
            f'(allowed: {self.allowed:.0e})'
        )
        return text + (f', {self.unmatched} unmatched' if self.unmatched else '')


def onnx_runner(path: Path, threads: int = 0) -> Callable[[Tensor], list[Tensor]]:
    """Runs an ONNX file in onnxruntime on the CPU; ``threads`` 0 leaves it the choice.

    Raises:
        ValueError: If onnxruntime cannot load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider']
        )
    except Exception as error:  # onnxruntime's own classes have no common base
        raise ValueError(f'onnxruntime cannot load {str(path)!r}: {error}') from error

    def run(images: Tensor) -> list[Tensor]:
        return [
            torch.from_numpy(x) for x in session.run(None, {'images': images.numpy()})
        ]

    return run


def program_runner(program: torch.export.ExportedProgram) -> Callable:
    """Runs a program of torch.export."""
    return torch.no_grad()(program.module())


def package_runner(path: Path) -> Callable:
    """Runs a package of AOTInductor."""
    return torch._inductor.aoti_load_package(str(path))


def detect(detector: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
    """The model's own detections of images (B, 3, H, W) from 0 to 255."""
    size = tuple(images.shape[2:])
    meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    samples = [DetDataSample(metainfo=meta) for _ in images]
    data = dict(inputs=list(images), data_samples=samples)
    with torch.no_grad():
        found = detector.eval().test_step(data)
    return [sample.pred_instances for sample in found]


def compare_maps(
    backbone: nn.Module, run: Callable, images: Tensor
) -> list[Difference]:
    """Maps of a backbone and of its exported graph."""
    with torch.no_grad():
        wanted = backbone.eval()(images)
    size = tuple(images.shape[2:])
    return [
        Difference(size, f'map{i}', _largest(out - map_), MAP_TOLERANCE)
        for i, out, map_ in zip(backbone.out_indices, run(images), wanted, strict=True)
    ]


def compare_detections(
    detector: nn.Module, run: Callable, images: Tensor
) -> list[Difference]:
    """Detections of a detector and of its exported graph.

    Each detection is matched with the nearest of the same label on the other side, as
    the order of nearly equal scores may change.
    """
    size = tuple(images.shape[2:])
    box_error, score_error, unmatched = [0.0], [0.0], 0
    for wanted, boxes, scores, labels in zip(
        detect(detector, images), *run(images), strict=True
    ):
        found = labels >= 0
        boxes, scores, labels = boxes[found], scores[found], labels[found]
        unmatched += abs(len(boxes) - len(wanted.bboxes))
        for box, score, label in zip(
            wanted.bboxes, wanted.scores, wanted.labels, strict=True
        ):
            same = labels == label
            if not same.any():
                unmatched += 1
                continue
            distance = (boxes[same] - box).abs().amax(1)
            nearest = distance.argmin()
            box_error.append(float(distance[nearest]))
            score_error.append(float((scores[same][nearest] - score).abs()))
    return [
        Difference(size, 'boxes', max(box_error), BOX_TOLERANCE, unmatched),
        Difference(size, 'scores', max(score_error), SCORE_TOLERANCE),
    ]


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def random_images(size: Sequence[int], batch: int = 1, pixels: bool = False) -> Tensor:
    """Images (B, 3, H, W), always the same: normalised, or of pixels from 0 to 255."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *size, generator=generator)
    return (images * 50 + 128).clamp(0, 255).round() if pixels else images


def medians_ms(
    functions: dict[str, Callable[[], object]], repeats: int = 10
) -> dict[str, float]:
    """Median time of each function in ms; they take turns, after one warm-up each."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def model_runner(
    model: nn.Module, images: Tensor, pixels: bool
) -> Callable[[], object]:
    """A call of the model itself on images, as it would run without an export."""
    if pixels:
        return functools.partial(detect, model, images)
    return torch.no_grad()(functools.partial(model.eval(), images))
