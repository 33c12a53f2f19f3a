"""A case of an op with a backend, ready to be measured."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..core.cases import FORWARD, FORWARD_BACKWARD, NotRun, Workload
from .backends import (
    BASELINES,
    inputs_of,
    make_call,
    out_of_memory_reason,
    unsupported_reason,
)
from .case import Call, OpCase

DIRECTIONS = (FORWARD, FORWARD_BACKWARD)


def build_workload(
    case: OpCase, device: torch.device, dtype: torch.dtype, backend: str
) -> Workload:
    """The call on random inputs.

    Raises:
        NotRun: If the backend cannot compute the case, or memory would run out.
    """
    reason = unsupported_reason(case, backend, device, dtype)
    if reason is not None:
        raise NotRun('unsupported', reason)
    reason = out_of_memory_reason(case, backend, device)
    if reason is not None:
        raise NotRun('skipped', reason)
    inputs = inputs_of(case, backend, case.make_inputs(device, dtype))
    return Workload(
        backend,
        op_calls(make_call(case, backend), inputs, case.make_grad_out(device, dtype)),
        is_foreign=backend in BASELINES,
    )


def op_calls(
    call: Call, inputs: Mapping[str, Tensor], grad_out: Tensor
) -> dict[str, Callable]:
    """Forward without gradients; the output and the gradients of all leaves."""
    leaves = [x for x in inputs.values() if x.requires_grad]

    @torch.no_grad()
    def forward() -> Tensor:
        return call(inputs)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(inputs), leaves, grad_out)

    return {FORWARD: forward, FORWARD_BACKWARD: forward_backward}
