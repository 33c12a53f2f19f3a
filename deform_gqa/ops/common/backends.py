"""Which backend runs an op: one predicate serves automatic and explicit choice."""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

logger = logging.getLogger('deform_gqa')

BACKENDS = ('auto', 'naive', 'torch', 'triton')


class OpModules(NamedTuple):
    """The folder of an op, and the modules in it that are its backends.

    They hold ``{op}_forward`` and ``{op}_backward``; None where the backend is plain
    torch code that its public function calls, or is missing.
    """

    folder: str
    torch: str | None = None
    triton: str | None = None


# The registry: an op is one folder and one entry here.
OPS = {
    'deform_attn': OpModules('deform_attn', 'tiled', 'triton_launch'),
    'deform_sample': OpModules('deform_sample', triton='triton_launch'),
    'deform_sdpa': OpModules('deform_sdpa', 'tiled', 'triton_launch'),
    'ms_deform_attn': OpModules('ms_deform_attn', 'tiled', 'triton_launch'),
    'neighborhood_attn': OpModules('neighborhood_attn', 'tiled', 'triton_launch'),
    'scaled_dot_product_gqa': OpModules('gqa'),
}
# Most (query, key, head) weights of a call for which materialising them is the fastest
# on a CPU: tiles have fixed costs. Measured; the first bound is for calls that keep
# what backward needs.
NAIVE_WEIGHTS = {True: 2**20, False: 3 * 2**17}
TRITON_HEAD_DIMS = range(8, 257)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# GPUs before Ampere have too little shared memory for the kernels.
TRITON_CAPABILITY = (8, 0)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec('triton') is not None


def _triton_interpreted() -> bool:
    return os.environ.get('TRITON_INTERPRET', '0') == '1'


def _device_reason(device: torch.device) -> str | None:
    """Why Triton kernels do not run on this device, or None."""
    if device.type != 'cuda':
        return f'Triton kernels run on CUDA devices, the tensors are on {device}'
    if not torch.cuda.is_available():
        return None  # fake tensors of a GPU that is not there
    index = torch.cuda.current_device() if device.index is None else device.index
    # torch keeps these; of the functions that tell, this one is known to torch.compile.
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    if capability < TRITON_CAPABILITY:
        return (
            f'Triton kernels need compute capability {_version(TRITON_CAPABILITY)} or '
            f'higher, got {_version(capability)}'
        )
    return None


def _version(capability: tuple[int, int]) -> str:
    return f'{capability[0]}.{capability[1]}'


def unsupported_reason(
    op: str,
    backend: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None = None,
) -> str | None:
    """Why ``backend`` cannot run this call of ``op``, or None if it can.

    Args:
        op: Name of the op, such as ``'deform_attn'``.
        backend: 'naive', 'torch' or 'triton'.
        device: Device of the tensors.
        dtype: dtype of q (of x for ``deform_sample``).
        head_dim: Head dimension D, where the op has one.

    Raises:
        ValueError: If there is no such op or backend.
    """
    if op not in OPS:
        raise ValueError(f'op must be one of {tuple(sorted(OPS))}, got {op!r}')
    if backend not in BACKENDS[1:]:
        raise ValueError(f'backend must be one of {BACKENDS[1:]}, got {backend!r}')
    if backend != 'triton':
        return None  # plain torch: every device, dtype and shape
    if OPS[op].triton is None:
        return f'{op} has no Triton kernel'
    if not _triton_installed():
        return 'the package triton is not installed'
    reason = None if _triton_interpreted() else _device_reason(device)
    if reason is not None:
        return reason
    if dtype not in TRITON_DTYPES:
        return f'Triton kernels take {TRITON_DTYPES}, got {dtype}'
    if head_dim is not None and head_dim not in TRITON_HEAD_DIMS:
        return f'Triton kernels take head dimensions 8 to 256, got {head_dim}'
    return None


@functools.cache
def implementation(op: str, backend: str, function: str) -> Callable:
    """A function of an op's backend; Triton is imported when it is first asked for."""
    modules = OPS[op]
    module = modules.torch if backend == 'torch' else modules.triton
    name = f'deform_gqa.ops.{modules.folder}.{module}'
    return getattr(importlib.import_module(name), function)


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown name; whether it can run shows in a call."""
    if backend not in BACKENDS:
        raise ValueError(f'backend must be one of {BACKENDS}, got {backend!r}')


def choose_backend(op: str, backend: str, *, weights: int | None = None, **call) -> str:
    """The backend that runs this call: 'naive', 'torch' or 'triton'.

    'auto' takes Triton on CUDA devices where it can run, else torch; on a CPU naive for
    a small call.

    Args:
        op: Name of the op.
        backend: What the caller asked for.
        weights: Number of (query, key, head) weights of an op for which naive is the
            fastest where they are few.
        call: As for :func:`unsupported_reason`.

    Raises:
        ValueError: If ``backend`` is unknown, or is named and cannot run the call.
    """
    check_backend(backend)
    if backend == 'auto':
        if call['device'].type != 'cuda':
            return 'naive' if _is_small(weights) else 'torch'
        reason = unsupported_reason(op, 'triton', **call)
        if reason is None:
            return 'triton'
        if not torch.compiler.is_compiling():  # logging would break the graph
            _log_once(f"{op}: backend 'torch' instead of 'triton': {reason}")
        return 'torch'
    reason = unsupported_reason(op, backend, **call)
    if reason is not None:
        raise ValueError(f'backend {backend!r} cannot run {op}: {reason}')
    return backend


def _is_small(weights: int | None) -> bool:
    # A compiled graph should not depend on the size.
    if weights is None or torch.compiler.is_compiling():
        return False
    return weights <= NAIVE_WEIGHTS[torch.is_grad_enabled()]


@functools.cache
def _log_once(message: str) -> None:
    logger.debug(message)
