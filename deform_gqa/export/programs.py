"""Graphs for changing image sizes: torch.export, ONNX and AOTInductor."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from .graphs import SIZE_DIVISOR
from .nms import nms_mask_onnx
from .sampling import SAMPLINGS, GatherSampling

LEAST_OPSET = 18  # torch's exporter writes no older one
DEFAULT_OPSET = 18
MOST_SIDE = 2**14  # pixels
# The sizes of the image that torch traces the graph with, in units of SIZE_DIVISOR
# above the least: different, as equal sizes would be taken for one.
TRACED = (3, 5)


def check_opset(opset: int) -> None:
    """Raises ValueError for an opset that the graphs cannot be written in."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not LEAST_OPSET <= opset <= newest:
        raise ValueError(
            f"opset must be from {LEAST_OPSET} (the oldest of torch's exporter) to "
            f'{newest} (the newest of the installed onnx), got {opset}'
        )


def check_sampling(sampling: str) -> None:
    """Raises ValueError for an unknown form of the bilinear sampling."""
    if sampling not in SAMPLINGS:
        raise ValueError(f'sampling must be one of {SAMPLINGS}, got {sampling!r}')


def check_size(graph: nn.Module, size: Sequence[int]) -> None:
    """Raises ValueError for a size (H, W) of images that a graph does not take."""
    for side in size:
        if side % SIZE_DIVISOR or side < graph.least_side:
            raise ValueError(
                f'the sides of images must be multiples of {SIZE_DIVISOR} and at least '
                f'{graph.least_side} pixels for this model, got {tuple(size)}'
            )


def trace(
    graph: nn.Module,
    *,
    sampling: str = 'gather',
    fixed_size: tuple[int, int] | None = None,
) -> torch.export.ExportedProgram:
    """torch.export of a graph of :mod:`deform_gqa.export.graphs`.

    Args:
        graph: A backbone or a detector.
        sampling: 'gather' or 'grid_sample', the form of all bilinear sampling.
        fixed_size: (H, W) of a graph for one image of that size. By default batch,
            height and width may change, the sides in steps of 32 pixels.

    Raises:
        ValueError: For an unknown ``sampling``, or a size that :func:`check_size`
            refuses.
    """
    check_sampling(sampling)
    if fixed_size is not None:
        check_size(graph, fixed_size)
        shapes, images = None, torch.zeros(1, 3, *fixed_size)
    else:
        least = graph.least_side // SIZE_DIVISOR
        most = MOST_SIDE // SIZE_DIVISOR
        sides = [
            SIZE_DIVISOR * torch.export.Dim(f'{name}_32', min=least, max=most)
            for name in ('height', 'width')
        ]
        shapes = ({0: torch.export.Dim('batch', max=2**10), 2: sides[0], 3: sides[1]},)
        images = torch.zeros(2, 3, *(SIZE_DIVISOR * (least + n) for n in TRACED))
    mode = GatherSampling() if sampling == 'gather' else contextlib.nullcontext()
    with torch.no_grad(), _quickly(), mode:
        return torch.export.export(
            graph, (images,), dynamic_shapes=shapes, strict=False
        )


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    output_names: list[str],
    opset: int = DEFAULT_OPSET,
) -> None:
    """Writes an ONNX file.

    Raises:
        ValueError: If the graph cannot be written in ``opset``.
    """
    import onnx

    check_opset(opset)
    with _quickly(), _quietly():
        onnx_program = torch.onnx.export(
            program,
            (),
            input_names=['images'],
            output_names=list(output_names),
            opset_version=opset,
            dynamo=True,
            verbose=False,
            custom_translation_table={
                torch.ops.deform_gqa_export.nms_mask.default: nms_mask_onnx
            },
        )
    written = onnx_program.model.opset_imports.get('')
    if written != opset:
        raise ValueError(
            f'torch {torch.__version__} cannot write this graph in opset {opset}, it '
            f'wrote opset {written}; take that'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_program.save(str(path), external_data=False)
    onnx.checker.check_model(str(path))


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Writes a .pt2 file, which ``torch.export.load`` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)


def write_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compiles with AOTInductor; ``torch._inductor.aoti_load_package`` reads the file.

    It needs a C++ compiler, and the program runs without this package.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    """Tracing without a cache that, where sizes are symbols, costs a third of it."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of torch's exporter about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
