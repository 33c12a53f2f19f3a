"""Time, peak memory, parameters and FLOPs of models: one row a call and backend."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deform_gqa.profiling.memory import PeakMemory, quick_collections

from .common_options import LATE, is_late
from .errors import GateError, one_line
from .flops import count_flops
from .model_options import ModelOptions
from .progress import progress
from .report import Row
from .timing import Timer

FORWARD, TRAIN = 'forward', 'train'
PLAIN = 'plain'  # backend of a model in which no op has backends
# Outputs of two backends: relative distance that rounding explains.
AGREEMENT = {None: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclasses.dataclass
class Workload:
    """A model that is built, and its calls.

    Attributes:
        model: For the number of parameters; None for a bare op.
        calls: One for each direction.
        backend: What computes the attention ops; ``PLAIN`` where there are none.
        compare: Output by which backends are compared; None for none.
        arguments: Tensors that a bare op is called with.
    """

    model: nn.Module | None
    calls: dict[str, Callable[[], Any]]
    backend: str
    compare: Callable[[], Tensor] | None = None
    arguments: Sequence[Tensor] = ()

    @property
    def arguments_mib(self) -> float:
        return sum(x.numel() * x.element_size() for x in self.arguments) / 2**20

    @property
    def params(self) -> int:
        if self.model is None:
            return 0
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """What is measured with each backend.

    Attributes:
        name: Unique in the report.
        fields: What tells the case from others, column by column.
        batch: Images (or sequences) a call, for the throughput.
        build: From a backend to the workload; raises Unsupported with the reason.
    """

    name: str
    fields: dict[str, Any]
    batch: int
    build: Callable[[str], Workload]


class Unsupported(Exception):
    """A backend cannot run a case."""


@dataclasses.dataclass
class Measurement:
    """Rows, and the description of each case for the report."""

    rows: list[Row]
    cases: list[dict[str, Any]]

    def as_report(self) -> dict[str, Any]:
        return {'rows': self.rows, 'cases': self.cases}


def model_calls(
    forward: Callable[[], Any],
    model: nn.Module,
    device: torch.device,
    amp: torch.dtype | None,
    inputs: Sequence[Tensor] = (),
) -> dict[str, Callable[[], Any]]:
    """Forward in eval mode without gradients; a training step without the optimiser.

    The step is forward in training mode, the mean square of all outputs as the loss,
    and backward to the parameters, and to those ``inputs`` that require a gradient. It
    leaves no gradient behind.
    """

    @torch.no_grad()
    def evaluate() -> Any:
        with autocast(device, amp):
            return forward()

    def train() -> Tensor:
        with autocast(device, amp):
            loss = mean_square(forward())
        loss.backward()
        model.zero_grad(set_to_none=True)
        for x in inputs:
            x.grad = None
        return loss

    return {
        FORWARD: in_mode(model, False, evaluate),
        TRAIN: in_mode(model, True, train),
    }


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


def tensors_of(outputs: Any) -> list[Tensor]:
    """All floating tensors in nested outputs."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = outputs.values()
    if isinstance(outputs, (str, bytes)) or not hasattr(outputs, '__iter__'):
        return []
    return [tensor for output in outputs for tensor in tensors_of(output)]


def mean_square(outputs: Any) -> Tensor:
    return sum(tensor.float().square().mean() for tensor in tensors_of(outputs))


def flat_output(call: Callable[[], Any]) -> Tensor:
    """All outputs of a call as one vector."""
    return torch.cat([tensor.flatten().float() for tensor in tensors_of(call())])


def check_agreement(
    case: str, first: tuple[str, Tensor], second: tuple[str, Tensor], amp
) -> None:
    """The outputs of two backends are the same up to rounding.

    Raises:
        GateError: If they are not.
    """
    (first_name, wanted), (second_name, got) = first, second
    distance = ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
    if not distance <= AGREEMENT[amp]:  # written so that NaN fails
        raise GateError(
            f'{case}: outputs of {second_name} and {first_name} differ by '
            f'{distance:.1e} of their norm'
        )


@quick_collections()
def measure(cases: Sequence[ModelCase], options: ModelOptions) -> Measurement:
    """Build and measure every case with every backend.

    Raises:
        GateError: If two backends give different outputs.
    """
    timer = Timer(options.device, options.sampling)
    deadline = options.deadline()
    found = Measurement([], [])
    steps = len(cases) * len(options.backends) * len(options.directions)
    with progress(steps) as step:
        for case in cases:
            run = _CaseRun(case, timer, options, deadline, step)
            for backend in options.backends:
                found.rows += run.rows(backend)
            found.cases.append({'name': case.name, **case.fields, **run.facts()})
    return found


class _CaseRun:
    """One case with one backend after the other."""

    def __init__(
        self,
        case: ModelCase,
        timer: Timer,
        options: ModelOptions,
        deadline: float | None,
        step: Callable[[str], None],
    ):
        self.case = case
        self.timer = timer
        self.directions = options.directions
        self.amp = options.amp_dtype
        self.compares = len(options.backends) > 1
        self.deadline = deadline
        self.step = step
        self.params: int | None = None
        self.flops: dict[str, int] = {}
        self.reference: tuple[str, Tensor] | None = None
        self.seen: set[str] = set()

    def facts(self) -> dict[str, Any]:
        return {'batch': self.case.batch, 'params': self.params}

    def rows(self, backend: str) -> list[Row]:
        """One for each direction; none for a second backend of a stock model."""
        rows = [
            Row(case=self.case.name, backend=backend, direction=direction)
            for direction in self.directions
        ]
        try:
            workload = self._build(backend)
        except Unsupported as reason:
            return [
                dataclasses.replace(row, status='unsupported', reason=str(reason))
                for row in rows
            ]
        if workload.backend in self.seen:
            return []
        self.seen.add(workload.backend)
        rows = [dataclasses.replace(row, backend=workload.backend) for row in rows]
        return [self._row(workload, row) for row in rows]

    def _build(self, backend: str) -> Workload:
        gc.collect()
        torch.manual_seed(0)  # the same weights for every backend
        workload = self.case.build(backend)
        self.params = workload.params
        return workload

    def _row(self, workload: Workload, row: Row) -> Row:
        self.step(f'{row.case} {row.backend} {row.direction}')
        if is_late(self.deadline):
            return dataclasses.replace(row, status='skipped', reason=LATE)
        measured: list[Row] = []
        with expected_failure(self.amp) as failure:
            measured.append(self._measure(workload, row))
        if failure:
            return dataclasses.replace(row, status='failed', reason=failure[0])
        return measured[0]

    def _measure(self, workload: Workload, row: Row) -> Row:
        call = workload.calls[row.direction]
        if row.direction not in self.flops:
            self.flops[row.direction] = count_flops(call)
        self._compare(workload)
        count = self.timer.warm_up(call)
        with PeakMemory(self.timer.device) as memory:
            timing = self.timer.sample(call, count)
        return dataclasses.replace(
            row,
            timing=timing,
            peak_memory_mib=memory.extra_mib,
            work={'flops': self.flops[row.direction], 'images': self.case.batch},
        )

    def _compare(self, workload: Workload) -> None:
        if not self.compares or workload.compare is None:
            return
        output = (workload.backend, workload.compare())
        if self.reference is None:
            self.reference = output
        elif self.reference[0] != workload.backend:
            check_agreement(self.case.name, self.reference, output, self.amp)


@contextlib.contextmanager
def expected_failure(amp: torch.dtype | None) -> Iterator[list[str]]:
    """Yields a list that holds the reason afterwards, if there is one.

    Memory may run out; and with mixed precision a kernel of someone else's may be
    missing. Any other error is a defect and ends the run.
    """
    failure: list[str] = []
    try:
        yield failure
    except torch.OutOfMemoryError as error:
        failure.append(one_line(error))
    except RuntimeError as error:
        # The CPU's allocator has no class of its own.
        if 'DefaultCPUAllocator' not in str(error) and not _is_missing(error, amp):
            raise
        failure.append(one_line(error))


def _is_missing(error: RuntimeError, amp: torch.dtype | None) -> bool:
    texts = ('not implemented for', 'same dtype', 'expected scalar type')
    return amp is not None and (
        isinstance(error, NotImplementedError)
        or any(text in str(error) for text in texts)
    )
