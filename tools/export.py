"""Export a backbone or a one-stage detector, and check the result.

    python tools/export.py CONFIG CHECKPOINT --out detector.onnx
    python tools/export.py CONFIG CHECKPOINT --out backbone.pt2 --part backbone \\
        --format torch

Formats: ``onnx``, ``torch`` (torch.export) and ``aoti`` (a package of AOTInductor).
The command compares the written file with the model at several sizes of the image, and
ends with an error where they differ by more than 1e-4 (maps, scores) or 1e-3 pixels
(boxes).
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import DictAction
from torch import Tensor, nn

from deform_gqa.engine import check_checkpoint
from deform_gqa.engine.detector_files import find_config, load_weights
from deform_gqa.export import programs, verify
from deform_gqa.export.graphs import SIZE_DIVISOR, BackboneGraph, DetectorGraph

SUFFIXES = dict(onnx='.onnx', torch='.pt2', aoti='.pt2')
# Sizes that are checked by default, in steps of SIZE_DIVISOR above the least one.
CHECKED = ((0, 0), (1, 3), (4, 2))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file, or the name of one')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', type=Path, required=True, help='file to write')
    parser.add_argument('--part', choices=['detector', 'backbone'], default='detector')
    parser.add_argument('--format', choices=list(SUFFIXES), default='onnx')
    parser.add_argument(
        '--sampling',
        choices=programs.SAMPLINGS,
        default='gather',
        help='form of the bilinear sampling; TensorRT needs gather',
    )
    parser.add_argument('--opset', type=int, default=programs.DEFAULT_OPSET)
    parser.add_argument(
        '--fixed-size',
        type=_size,
        metavar='HxW',
        help='export for one image of this size (default: any batch and size)',
    )
    parser.add_argument(
        '--check-sizes',
        type=_size,
        nargs='+',
        metavar='HxW',
        help='sizes at which the result is compared with the model',
    )
    parser.add_argument(
        '--benchmark',
        action='store_true',
        help='print the times of the result and of the model, at each checked size',
    )
    parser.add_argument('--threads', type=int, help='for both sides of --benchmark')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split('x'))
    except ValueError as error:
        message = f'must be HEIGHTxWIDTH in pixels, got {text!r}'
        raise argparse.ArgumentTypeError(message) from error
    return height, width


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError before a model is built."""
    suffix = SUFFIXES[args.format]
    if args.out.suffix != suffix:
        raise ValueError(
            f'--out must end with {suffix} for --format {args.format}, got '
            f'{str(args.out)!r}'
        )
    if args.format == 'aoti' and args.part == 'detector':
        raise ValueError(
            "--format aoti takes --part backbone: a detector's NMS is an op of this "
            'package, which a compiled package cannot hold'
        )
    if args.format == 'onnx':
        programs.check_opset(args.opset)
    if args.threads is not None and args.threads < 1:
        raise ValueError(f'--threads must be at least 1, got {args.threads}')
    check_checkpoint(args.checkpoint)


def build(args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """The model (detector or backbone) with its weights, and its graph."""
    config = find_config(args.config)
    if args.cfg_options:
        config.merge_from_dict(args.cfg_options)
    register_all_modules()
    model = MODELS.build(config.model).eval()
    load_weights(model, args.checkpoint)
    if args.part == 'detector':
        return model, DetectorGraph(model)
    return model.backbone, BackboneGraph(model.backbone)


def sizes_to_check(args: argparse.Namespace, graph: nn.Module) -> list[tuple[int, int]]:
    if args.fixed_size is not None:
        return [args.fixed_size]
    if args.check_sizes is not None:
        return args.check_sizes
    steps = (tuple(SIZE_DIVISOR * n for n in pair) for pair in CHECKED)
    return [(graph.least_side + y, graph.least_side + x) for y, x in steps]


def write(
    args: argparse.Namespace, graph: nn.Module
) -> Callable[[Tensor], list[Tensor]]:
    """Writes the file; returns what runs it."""
    program = programs.trace(graph, sampling=args.sampling, fixed_size=args.fixed_size)
    if args.format == 'onnx':
        programs.write_onnx(program, args.out, graph.output_names, args.opset)
        return verify.onnx_runner(args.out, args.threads or 0)
    if args.format == 'torch':
        programs.write_program(program, args.out)
        return verify.program_runner(torch.export.load(args.out))
    programs.write_package(program, args.out)
    return verify.package_runner(args.out)


def check(
    args: argparse.Namespace, model: nn.Module, run: Callable, size: tuple[int, int]
) -> bool:
    """Prints how far the result is from the model; whether it is near enough."""
    pixels = args.part == 'detector'
    images = verify.random_images(size, pixels=pixels)
    compare = verify.compare_detections if pixels else verify.compare_maps
    differences = compare(model, run, images)
    for difference in differences:
        print(difference, flush=True)
    if args.benchmark:
        times = verify.medians_ms(
            dict(
                model=verify.model_runner(model, images, pixels),
                exported=functools.partial(run, images),
            )
        )
        print(
            f'{size[0]} x {size[1]}, {torch.get_num_threads()} threads of torch: model '
            f'{times["model"]:.1f} ms, {args.format} {times["exported"]:.1f} ms, '
            f'{times["model"] / times["exported"]:.2f} times as fast',
            flush=True,
        )
    return all(difference.is_within for difference in differences)


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        check_options(args)
        model, graph = build(args)
        sizes = sizes_to_check(args, graph)
        for size in sizes:
            programs.check_size(graph, size)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        print(
            f'exporting {type(model).__name__}; images of at least {graph.least_side} '
            'pixels. This takes minutes for a large model',
            flush=True,
        )
        run = write(args, graph)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f'written: {args.out}')
    are_near = [check(args, model, run, size) for size in sizes]
    if not all(are_near):
        parser.exit(1, f'{args.out} differs from the model by more than is allowed\n')


if __name__ == '__main__':
    main()
