"""Calls off the middle of the road: shifted logits, scaled gradients, odd tails.

Every backend is compared with naive in float64, as in the middle of it.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from cases import output_and_gradients, shift_logits, unshift_gradient
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import assert_as_good_as, to_double

# Relative to the largest exact value, beside twice the error of naive.
ATOL = {
    torch.float64: 1e-10,
    torch.float32: 5e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}


@dataclasses.dataclass
class Load:
    """What a call has to bear.

    Attributes:
        shift: What all logits lie around.
        loss_scale: Of the gradients, as a GradScaler's.
        deterministic: Whether torch.use_deterministic_algorithms is on.
    """

    shift: int
    loss_scale: int
    deterministic: bool


@st.composite
def loads(draw) -> Load:
    return Load(
        shift=draw(st.integers(-300, 300)),
        loss_scale=2 ** draw(st.integers(0, 16)),
        deterministic=draw(st.booleans()),
    )


@contextlib.contextmanager
def determinism(deterministic: bool):
    """torch.use_deterministic_algorithms for a while."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_load(
    op: Callable, naive: Callable, inputs: list[Tensor | None], load: Load
) -> None:
    """Compares ``op`` with ``naive`` under ``load``; inputs lead with q and k."""
    shift_logits(*inputs[:2], load.shift)
    results = _results(op, naive, inputs, load)
    for tensors in results:
        tensors[1] = unshift_gradient(tensors[1], load.shift)
    assert_as_good_as(*results, ATOL[inputs[0].dtype], load.loss_scale)


def check_scaled(
    op: Callable, naive: Callable, inputs: list[Tensor | None], load: Load
) -> None:
    """As :func:`check_load` for an op without logits."""
    results = _results(op, naive, inputs, load)
    assert_as_good_as(*results, ATOL[inputs[0].dtype], load.loss_scale)


def _results(op, naive, inputs, load) -> list[list[Tensor]]:
    with determinism(load.deterministic):
        actual = output_and_gradients(op, inputs, load.loss_scale)
    return [
        actual,
        output_and_gradients(naive, inputs, load.loss_scale),
        output_and_gradients(naive, to_double(inputs), load.loss_scale),
    ]
