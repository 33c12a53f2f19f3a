"""What a suite measures: cases, what a backend makes of them, and directions."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from .kv_heads import Heads

# What a call does. Ops and models: outputs without gradients.
FORWARD = 'forward'
# Ops: the output and the gradients of all inputs.
FORWARD_BACKWARD = 'forward+backward'
# Models: forward in training mode, a loss, and gradients of all parameters.
TRAIN = 'train'
# Detectors: the data preprocessor; the network with its post-processing.
PREPROCESS, PREDICT = 'preprocess', 'predict'
# Data: a batch from the loader; one transform of one image.
BATCH, TRANSFORM = 'batch', 'transform'

PLAIN = 'plain'  # backend of a model in which no op has backends
Status = Literal['ok', 'unsupported', 'failed', 'skipped']


class NotRun(Exception):
    """A backend will not run a case, with the status and reason of its rows."""

    def __init__(self, status: Status, reason: str):
        super().__init__(reason)
        self.status: Status = status


@dataclasses.dataclass
class Workload:
    """A case that a backend can run.

    Attributes:
        backend: What computes; ``PLAIN`` where our ops have no part.
        calls: One for each direction; they hand their results back, so that these are
            alive at the memory peak.
        check: Raises GateError if the backend computes something wrong.
        output: What backends of a model are compared by.
        model: Whose parameters are counted; None for a bare op.
        resident_mib: Memory in use before the call that is to count as the call's.
        is_foreign: Other people's code: that it cannot run a case is a result, not a
            defect.
    """

    backend: str
    calls: dict[str, Callable[[], Any]]
    check: Callable[[], None] | None = None
    output: Callable[[], Tensor] | None = None
    model: nn.Module | None = None
    resident_mib: float = 0.0
    is_foreign: bool = False

    @property
    def params(self) -> int:
        if self.model is None:
            return 0
        return sum(parameter.numel() for parameter in self.model.parameters())


def _nothing(_direction: str) -> dict[str, Any]:
    return {}


@dataclasses.dataclass
class Case:
    """What is measured with each backend.

    Attributes:
        name: Unique in the report.
        fields: What the report says of the case; 'params' is filled in when the case
            has been built.
        images: Images (or sequences) of a call, for the throughput.
        build: From a backend to the workload; raises NotRun.
        row_fields: What rows of a direction hold, measured or not.
        heads: Of its attention; None where kv heads cannot be set.
        subject: The case in words, whatever its kv heads.
    """

    name: str
    fields: dict[str, Any]
    images: int
    build: Callable[[str], Workload]
    row_fields: Callable[[str], dict[str, Any]] = _nothing
    heads: Heads | None = None
    subject: str = ''

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {'name': self.name, **self.fields}
