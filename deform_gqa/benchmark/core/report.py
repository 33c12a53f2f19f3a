"""What a suite hands back, and the files it is written to."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from deform_gqa.profiling.environment import describe_environment
from deform_gqa.profiling.timing import Timing

from .cases import Case, Status

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    Attributes:
        case: Name of one of the report's cases.
        backend: What computed it.
        direction: What the call does; see ``cases``.
        status: 'ok', or 'unsupported', 'failed', 'skipped' with a reason.
        reason: One line; None for 'ok'.
        timing: All samples; None unless 'ok'.
        peak_memory_mib: Peak of the call over the use before; None if unknown.
        work: pairs, exps, flops and bytes of the call.
        roofline_us: Least time on this device by limit; None for unknown devices. The
            files call it ``floor_us``.
    """

    case: str
    backend: str
    direction: str
    status: Status = 'ok'
    reason: str | None = None
    timing: Timing | None = None
    peak_memory_mib: float | None = None
    work: dict[str, int] = dataclasses.field(default_factory=dict)
    roofline_us: dict[str, float] | None = None

    @property
    def least_us(self) -> float | None:
        """Time of the limit that binds."""
        return None if self.roofline_us is None else max(self.roofline_us.values())

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        record['floor_us'] = record.pop('roofline_us')
        del record['timing']
        if self.timing is not None:
            record['median_ms'] = self.timing.median_ms
            record['p20_ms'] = self.timing.p20_ms
            record['p80_ms'] = self.timing.p80_ms
            record['samples_ms'] = list(self.timing.samples_ms)
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> 'Row':
        values = {'roofline_us': record.get('floor_us')}
        for field in dataclasses.fields(cls):
            if field.name in record:
                values[field.name] = record[field.name]
        if 'samples_ms' in record:
            values['timing'] = Timing(tuple(record['samples_ms']))
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Report:
    """All rows of one run of a suite, with all that they depend on."""

    suite: str
    command: str
    environment: dict[str, Any]
    options: dict[str, Any]
    cases: list[dict[str, Any]]
    rows: list[Row]

    @classmethod
    def of(
        cls,
        suite: str,
        command: str,
        device: torch.device,
        options: dict[str, Any],
        cases: Iterable[Case | dict[str, Any]],
        rows: list[Row],
    ) -> 'Report':
        """What was measured here and now, with the threads that are in use."""
        described = [x if isinstance(x, dict) else x.describe() for x in cases]
        environment = describe_environment(device)
        return cls(suite, command, environment, options, described, rows)

    def row(self, case: str, backend: str, direction: str) -> Row | None:
        """The measured row, or None."""
        for row in self.rows:
            key = (row.case, row.backend, row.direction)
            if key == (case, backend, direction) and row.status == 'ok':
                return row
        return None

    def measured_cases(self) -> list[dict[str, Any]]:
        """Cases of which something was measured."""
        names = {row.case for row in self.rows if row.timing is not None}
        return [case for case in self.cases if case['name'] in names]

    def to_json(self) -> dict[str, Any]:
        record = {'format_version': FORMAT_VERSION}
        record.update(
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
        )
        record['rows'] = [row.to_json() for row in self.rows]
        return record

    @classmethod
    def load(cls, path: Path) -> 'Report':
        """Read a report back.

        Raises:
            ValueError: If the file is not a report of this format.
        """
        record = json.loads(path.read_text())
        version = record.pop('format_version', None)
        if version != FORMAT_VERSION:
            raise ValueError(
                f'{path} has format version {version}, expected {FORMAT_VERSION}'
            )
        rows = [Row.from_json(row) for row in record.pop('rows')]
        return cls(rows=rows, **record)
