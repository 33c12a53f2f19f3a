"""Every backend that computes a case: ours by name, and the case's baselines."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deform_gqa import ops
from deform_gqa.profiling.memory import available_cpu_mib

from ..core.tables import REFERENCE
from .case import Baseline, Call, OpCase
from .registry import OP_CASES

OWN_BACKENDS = (REFERENCE, 'torch', 'triton')
BASELINES: dict[str, None] = dict.fromkeys(
    name for case in OP_CASES.values() for name in case.baselines
)
BACKENDS = (*OWN_BACKENDS, *BASELINES)
_MIB = 2**20


def default_backends() -> tuple[str, ...]:
    """All, less baselines that are not available here."""
    found = [case.baselines for case in OP_CASES.values()]
    return tuple(
        name
        for name in BACKENDS
        if name in OWN_BACKENDS
        or any(name in each and each[name].is_available() for each in found)
    )


def unsupported_reason(
    case: OpCase, backend: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why ``backend`` cannot compute ``case``, or None."""
    if backend in OWN_BACKENDS:
        return ops.unsupported_reason(
            case.op, backend, device=device, dtype=dtype, head_dim=case.head_dim
        )
    baseline = case.baselines.get(backend)
    if baseline is None:
        return f'{backend} does not compute {case.op}'
    return baseline.unsupported_reason(case, device, dtype)


def make_call(case: OpCase, backend: str) -> Call:
    """The function from the case's tensors to its output.

    Raises:
        ValueError: For a backend that does not exist, or does not compute the op.
    """
    if backend in OWN_BACKENDS:
        op = getattr(ops, case.op)
        return lambda tensors: op(**tensors, **case.options(), backend=backend)
    return baseline_of(case, backend).call(case)


def baseline_of(case: OpCase, backend: str) -> Baseline:
    """The case's baseline of that name; ValueError where there is none."""
    if backend not in BASELINES:
        raise ValueError(f'backend must be one of {BACKENDS}, got {backend!r}')
    if backend not in case.baselines:
        raise ValueError(f'{backend!r} is not written for {case.op}')
    return case.baselines[backend]


def inputs_of(
    case: OpCase, backend: str, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inputs, those detached that ``backend`` has no gradients of."""
    if backend in OWN_BACKENDS:
        return dict(inputs)
    constants = baseline_of(case, backend).constants
    return {n: x.detach() if n in constants else x for n, x in inputs.items()}


def materialised_mib(case: OpCase, backend: str) -> float:
    """About what the tensors with a value a pair take; 0 for a fused backend."""
    return case.pair_values(backend) * 4 / _MIB


def out_of_memory_reason(
    case: OpCase, backend: str, device: torch.device
) -> str | None:
    """Why the call would not fit into free memory, or None."""
    needed = materialised_mib(case, backend)
    if device.type == 'cuda':
        free: float | None = _free_cuda_mib(device)
    else:
        free = available_cpu_mib()
    if free is None or needed <= free:
        return None
    return f'needs about {needed / 1024:.1f} GiB, {free / 1024:.1f} GiB are free'


def _free_cuda_mib(device: torch.device) -> float:
    """Free memory, and what torch has reserved and does not use."""
    reserved = torch.cuda.memory_reserved(device)
    unused = reserved - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) / _MIB
