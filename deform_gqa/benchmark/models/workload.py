"""A model's calls, and the comparison of its outputs between backends."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deform_gqa.profiling.module_timing import tensors_of

from ..core.cases import FORWARD, TRAIN
from ..core.errors import GateError

# Outputs of two backends: relative distance that rounding explains.
TOLERANCE = {None: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def model_calls(
    forward: Callable[[], Any],
    model: nn.Module,
    device: torch.device,
    amp: torch.dtype | None,
    inputs: Sequence[Tensor] = (),
) -> dict[str, Callable[[], Any]]:
    """Forward, and a training step with the mean square of all outputs as the loss."""
    where = model, device, amp
    return {
        FORWARD: evaluation(forward, *where),
        TRAIN: training_step(lambda: mean_square(forward()), *where, inputs),
    }


def evaluation(
    forward: Callable[[], Any],
    model: nn.Module,
    device: torch.device,
    amp: torch.dtype | None,
) -> Callable[[], Any]:
    """The call in eval mode, without gradients."""

    @torch.no_grad()
    def evaluate() -> Any:
        with autocast(device, amp):
            return forward()

    return in_mode(model, False, evaluate)


def training_step(
    find_loss: Callable[[], Tensor],
    model: nn.Module,
    device: torch.device,
    amp: torch.dtype | None,
    inputs: Sequence[Tensor] = (),
) -> Callable[[], Tensor]:
    """Forward in training mode and backward, without the optimiser.

    Backward goes to the parameters, and to those ``inputs`` that require a gradient.
    The step leaves no gradient behind.
    """

    def train() -> Tensor:
        with autocast(device, amp):
            loss = find_loss()
        loss.backward()
        model.zero_grad(set_to_none=True)
        for x in inputs:
            x.grad = None
        return loss

    return in_mode(model, True, train)


def in_mode(
    model: nn.Module, training: bool, call: Callable[[], Any]
) -> Callable[[], Any]:
    """The call, with the model in training or eval mode; free where it is already."""

    def run() -> Any:
        if model.training != training:
            model.train(training)
        return call()

    return run


def autocast(device: torch.device, amp: torch.dtype | None):
    """Mixed precision, or nothing."""
    if amp is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=amp)


def mean_square(outputs: Any) -> Tensor:
    return sum(tensor.float().square().mean() for tensor in tensors_of(outputs))


def flat_output(call: Callable[[], Any]) -> Tensor:
    """All outputs of a call as one vector."""
    return torch.cat([tensor.flatten().float() for tensor in tensors_of(call())])


class Agreement:
    """Holds the outputs of all backends of a case against those of the first."""

    def __init__(self, case: str, amp: torch.dtype | None):
        self.case = case
        self.amp = amp
        self.first: tuple[str, Tensor] | None = None

    def check(self, backend: str, output: Callable[[], Tensor]) -> None:
        """Calls for the output, keeps the first and compares the others.

        Raises:
            GateError: If one differs by more than rounding explains.
        """
        if self.first is None:
            self.first = (backend, output())
            return
        name, wanted = self.first
        distance = (output() - wanted).norm() / wanted.norm().clamp(min=1e-30)
        if not distance <= TOLERANCE[self.amp]:  # written so that NaN fails
            raise GateError(
                f'{self.case}: outputs of {backend} and {name} differ by '
                f'{distance:.1e} of their norm'
            )
