"""Which backend runs an op: one predicate serves automatic and explicit choice."""

import functools
import importlib.util
import logging
import os

import torch

logger = logging.getLogger('deform_gqa')

BACKENDS = ('auto', 'naive', 'torch', 'triton')
# Ops that have a Triton kernel.
TRITON_OPS = frozenset({'deform_attn', 'deform_sample', 'deform_sdpa'})
TRITON_HEAD_DIMS = range(8, 257)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec('triton') is not None


def _triton_interpreted() -> bool:
    return os.environ.get('TRITON_INTERPRET', '0') == '1'


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
    """
    if backend != 'triton':
        return None  # plain torch: every device, dtype and shape
    if op not in TRITON_OPS:
        return f'{op} has no Triton kernel'
    if not _triton_installed():
        return 'the package triton is not installed'
    if device.type != 'cuda' and not _triton_interpreted():
        return f'Triton kernels run on CUDA devices, the tensors are on {device}'
    if dtype not in TRITON_DTYPES:
        return f'Triton kernels take {TRITON_DTYPES}, got {dtype}'
    if head_dim is not None and head_dim not in TRITON_HEAD_DIMS:
        return f'Triton kernels take head dimensions 8 to 256, got {head_dim}'
    return None


def choose_backend(op: str, backend: str, **call) -> str:
    """The backend that runs this call: 'naive', 'torch' or 'triton'.

    'auto' takes Triton on CUDA devices where it can run, else torch.

    Raises:
        ValueError: If ``backend`` is unknown, or is named and cannot run the call.
    """
    if backend not in BACKENDS:
        raise ValueError(f'backend must be one of {BACKENDS}, got {backend!r}')
    if backend == 'auto':
        if call['device'].type != 'cuda':
            return 'torch'
        reason = unsupported_reason(op, 'triton', **call)
        if reason is None:
            return 'triton'
        _log_once(f"{op}: backend 'torch' instead of 'triton': {reason}")
        return 'torch'
    reason = unsupported_reason(op, backend, **call)
    if reason is not None:
        raise ValueError(f'backend {backend!r} cannot run {op}: {reason}')
    return backend


@functools.cache
def _log_once(message: str) -> None:
    logger.debug(message)
