"""The published fused kernel of deform_sdpa as a baseline, from a folder of the user.

It is the public repository "Fused Deformable Scaled Dot-Product Multi-Head Attention
(Triton)", whose package ``ops.triton`` holds ``deform_sdpa_triton(q, k, v, coords,
width, height, scale)``. It gives no gradient of the coordinates. No part of it is
here.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import OptionError
from .case import Baseline, Call, OpCase

NAME = 'published'
PATH_VARIABLE = 'DEFORM_SDPA_PUBLISHED'
HEAD_DIMS = (16, 32, 64, 128, 256)


def folder() -> Path | None:
    """The user's copy of the repository; None if the variable is not set."""
    path = os.environ.get(PATH_VARIABLE)
    return Path(path) if path else None


def unsupported_reason(
    case: OpCase, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why it cannot compute ``case``, or None."""
    if folder() is None:
        return f'{PATH_VARIABLE} names no folder with the repository'
    if device.type != 'cuda':
        return 'the published kernel runs on CUDA only'
    if dtype == torch.bfloat16:
        return 'the published kernel knows no bfloat16'
    if case.num_kv_heads != case.num_heads:
        return 'the published kernel knows no grouped heads'
    if case.head_dim not in HEAD_DIMS:
        return f'the published kernel knows no head dim {case.head_dim}'
    return None


@contextlib.contextmanager
def _imports_from(path: Path) -> Iterator[None]:
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))


def load() -> Callable[..., Tensor]:
    """``deform_sdpa_triton`` of the user's copy.

    Raises:
        OptionError: If the folder does not hold it.
    """
    path = folder()
    if path is None:
        raise OptionError(f'{PATH_VARIABLE} is not set')
    try:
        with _imports_from(path):
            return importlib.import_module('ops.triton').deform_sdpa_triton
    except (ImportError, AttributeError) as error:
        raise OptionError(
            f'{PATH_VARIABLE}={path} holds no ops.triton.deform_sdpa_triton: {error}'
        ) from error


def call(case: OpCase) -> Call:
    """The function from the case's tensors to its output."""
    op = load()
    height, width = case.grid_size

    def run(tensors: Mapping[str, Tensor]) -> Tensor:
        q, k, v = (tensors[name] for name in 'qkv')
        return op(q, k, v, tensors['coords'], width, height, case.head_dim**-0.5)

    return run


BASELINE = Baseline(
    call,
    unsupported_reason,
    is_available=lambda: folder() is not None,
    constants=('coords',),
)
