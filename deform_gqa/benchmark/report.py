"""What a suite hands back, and the files it is written to."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from deform_gqa.profiling.timing import Timing

FORMAT_VERSION = 1
Status = Literal['ok', 'unsupported', 'failed', 'skipped']


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    Attributes:
        case: Name of one of the report's cases.
        backend: What computed it.
        direction: 'forward' or 'forward+backward'.
        status: 'ok', or 'unsupported', 'failed', 'skipped' with a reason.
        reason: One line; None for 'ok'.
        timing: All samples; None unless 'ok'.
        peak_memory_mib: Peak of the call over the use before; None if unknown.
        work: pairs, exps, flops and bytes of the call.
        floor_us: Least time on this device by limit; None for unknown devices.
    """

    case: str
    backend: str
    direction: str
    status: Status = 'ok'
    reason: str | None = None
    timing: Timing | None = None
    peak_memory_mib: float | None = None
    work: dict[str, int] = dataclasses.field(default_factory=dict)
    floor_us: dict[str, float] | None = None

    @property
    def least_us(self) -> float | None:
        """The binding floor."""
        return None if self.floor_us is None else max(self.floor_us.values())

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        del record['timing']
        if self.timing is not None:
            record['median_ms'] = self.timing.median_ms
            record['p20_ms'] = self.timing.p20_ms
            record['p80_ms'] = self.timing.p80_ms
            record['samples_ms'] = list(self.timing.samples_ms)
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> 'Row':
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: x for name, x in record.items() if name in names}
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

    def row(self, case: str, backend: str, direction: str) -> Row | None:
        """The measured row, or None."""
        for row in self.rows:
            key = (row.case, row.backend, row.direction)
            if key == (case, backend, direction) and row.status == 'ok':
                return row
        return None

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

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + '\n')
