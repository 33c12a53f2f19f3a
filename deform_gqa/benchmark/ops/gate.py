"""The correctness gate: no figure is reported of a backend that computes wrongly."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import GateError
from ..core.tables import REFERENCE
from .backends import inputs_of, make_call
from .case import Call, OpCase

# Pairs of a checked case: naive in double precision on all of stage 1 is quick on a
# GPU only.
MAX_PAIRS = {'cuda': 150_000_000, 'cpu': 700_000}
# Beside twice the error of naive in the same dtype; of the largest reference value.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Interpolation has a kink at every cell: rounding decides which slope a pair takes.
COORDINATE_TOLERANCE = 5e-3
# Of the largest gradient: what rounding in double precision leaves of a smaller one.
_ZERO = 1e-12


def leaves(
    inputs: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Copies that require gradients, in another dtype if one is given.

    Integers have no gradients and stay as they are.
    """
    return {
        name: x.detach().to(dtype or x.dtype).requires_grad_()
        if x.is_floating_point()
        else x
        for name, x in inputs.items()
    }


def run(
    call: Call, inputs: Mapping[str, Tensor], grad_out: Tensor
) -> dict[str, Tensor]:
    """Output and gradients of all inputs that require them."""
    out = call(inputs)
    sources = {name: x for name, x in inputs.items() if x.requires_grad}
    grads = torch.autograd.grad(out, list(sources.values()), grad_out.to(out.dtype))
    named = {f'grad_{n}': g for n, g in zip(sources, grads, strict=True)}
    return {'out': out.detach(), **named}


def errors_of(
    results: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, float]:
    """Largest error of each, relative to the largest reference value.

    A gradient that is zero, but for what rounding leaves of terms that cancel, as those
    of q and k where a query has one key, is held to the largest of all instead.
    """
    sizes = {name: x.abs().max().item() for name, x in reference.items()}
    largest = max(sizes.values())
    return {
        name: (found.double() - reference[name]).abs().max().item()
        / max(sizes[name] if sizes[name] > _ZERO * largest else largest, 1e-30)
        for name, found in results.items()
    }


class Gate:
    """Compares backends with naive in float64; remembers what it has checked."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device = device
        self.dtype = dtype
        self.max_pairs = MAX_PAIRS.get(device.type, MAX_PAIRS['cpu'])
        self._passed: set[tuple[OpCase, str]] = set()

    def small_case(self, case: OpCase) -> OpCase:
        """The case that is checked in place of ``case``."""
        return case.reduced(self.max_pairs)

    def check(self, case: OpCase, backend: str) -> None:
        """Check one backend.

        Raises:
            GateError: If an output or a gradient is wrong, with all such errors.
        """
        case = self.small_case(case)
        if backend == REFERENCE or (case, backend) in self._passed:
            return
        inputs = case.make_inputs(self.device, self.dtype)
        grad_out = case.make_grad_out(self.device, self.dtype)
        naive = make_call(case, REFERENCE)
        exact = leaves(inputs, torch.float64)
        reference = run(naive, exact, grad_out.double())
        allowed = errors_of(run(naive, inputs, grad_out), reference)
        call = make_call(case, backend)
        inputs = inputs_of(case, backend, leaves(inputs, None))
        errors = errors_of(run(call, inputs, grad_out), reference)
        wrong = [
            f'{name} is off by {errors[name]:.1e} (naive: {allowed[name]:.1e})'
            for name in errors
            # written so that NaN fails
            if not errors[name] <= 2 * allowed[name] + self._tolerance(case, name)
        ]
        if wrong:
            raise GateError(f'{backend} is wrong on {case.name}: ' + '; '.join(wrong))
        self._passed.add((case, backend))

    def _tolerance(self, case: OpCase, name: str) -> float:
        tolerance = TOLERANCE[self.dtype]
        if name.removeprefix('grad_') in case.coordinates:
            return max(tolerance, COORDINATE_TOLERANCE)
        return tolerance
