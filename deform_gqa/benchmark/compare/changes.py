"""Two reports row by row: ratios of medians, and how far noise alone could move them.

Imports numpy alone.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deform_gqa.profiling.timing import Timing

from ..core.errors import OptionError
from ..core.report import Report, Row

Verdict = Literal['slower', 'same', 'faster']
CONFIDENCE = 0.95
RESAMPLES = 1000
# Fewer samples say too little about their spread: their whole range is the band.
LEAST_SAMPLES = 8
# What must be the same in both reports, and where a report has it.
SAME = ('suite', 'device', 'threads', 'dtype')


@dataclasses.dataclass(frozen=True)
class Change:
    """One row before and after.

    Attributes:
        ratio: Median time after over before; above 1 is slower.
        low: Lower end of the ratio's noise band.
        high: Upper end.
        memory_ratio: Peak memory after over before; None where one is unknown.
    """

    case: str
    backend: str
    direction: str
    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    memory_ratio: float | None

    def verdict(self, tolerance: float) -> Verdict:
        """Slower or faster only if all of the band lies beyond the tolerance."""
        if self.low > 1 + tolerance:
            return 'slower'
        return 'faster' if self.high < 1 / (1 + tolerance) else 'same'


def noise_band(before: Timing, after: Timing, rows: int = 1) -> tuple[float, float]:
    """Confidence interval of the ratio of medians, after over before.

    Its width is the standard error of the logarithm among resampled medians. It holds
    for all ``rows`` of a comparison together: of a hundred, some would look slower by
    chance. With few samples, all ratios of a sample after to a sample before.
    """
    first, second = (np.asarray(timing.samples_ms) for timing in (before, after))
    if min(len(first), len(second)) < LEAST_SAMPLES:
        low, high = second.min() / first.max(), second.max() / first.min()
        return float(low), float(high)
    generator = np.random.default_rng(0)
    logs = np.log(_medians(second, generator) / _medians(first, generator))
    tail = (1 - CONFIDENCE) / 2 / rows
    width = statistics.NormalDist().inv_cdf(1 - tail) * float(logs.std(ddof=1))
    ratio = after.median_ms / before.median_ms
    return ratio * math.exp(-width), ratio * math.exp(width)


def _medians(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Medians of samples drawn from the samples, with replacement."""
    drawn = generator.choice(samples, (RESAMPLES, len(samples)))
    return np.median(drawn, axis=1)


def load_report(path: str) -> Report:
    """Read a report.

    Raises:
        OptionError: If the file is missing or no report.
    """
    try:
        return Report.load(Path(path))
    except OSError as error:
        raise OptionError(f'{path}: {error.strerror}') from error
    except json.JSONDecodeError as error:
        raise OptionError(f'{path} is no JSON file: {error}') from error
    except (KeyError, TypeError, AttributeError) as error:
        raise OptionError(f'{path} is no report of this tool: {error}') from error
    except ValueError as error:
        raise OptionError(str(error)) from error


def _facts(report: Report) -> dict[str, Any]:
    env = report.environment
    return {
        'suite': report.suite,
        'device': env.get('device'),
        # CPU threads do not matter to what runs on a GPU.
        'threads': env.get('threads') if env.get('device_type') == 'cpu' else None,
        'dtype': report.options.get('dtype'),
    }


def differences(before: Report, after: Report) -> list[str]:
    """Why the reports cannot be compared, one line each."""
    first, second = _facts(before), _facts(after)
    lines = [
        f'{name}: {first[name]} before, {second[name]} after'
        for name in SAME
        if first[name] != second[name]
    ]
    cases = {case['name']: case for case in before.cases}
    lines += [
        f'case {case["name"]} is another than before'
        for case in after.cases
        if cases.get(case['name'], case) != case
    ]
    measured = {_key(row) for row in _measured(after)}
    lines += [
        f'{" ".join(_key(row))} is missing after'
        for row in _measured(before)
        if _key(row) not in measured
    ]
    return lines


def _key(row: Row) -> tuple[str, str, str]:
    return row.case, row.backend, row.direction


def _measured(report: Report) -> list[Row]:
    return [row for row in report.rows if row.timing is not None]


def compare(before: Report, after: Report) -> list[Change]:
    """All rows that both reports measured, in the order of the second."""
    rows = {_key(row): row for row in _measured(before)}
    common = [row for row in _measured(after) if _key(row) in rows]
    return [change(rows[_key(row)], row, len(common)) for row in common]


def change(before: Row, after: Row, rows: int = 1) -> Change:
    """Two measured rows of the same case, backend and direction, out of ``rows``."""
    if before.timing is None or after.timing is None:
        raise ValueError(f'{after.case} was not measured in both reports')
    low, high = noise_band(before.timing, after.timing, rows)
    memory = None
    if before.peak_memory_mib and after.peak_memory_mib is not None:
        memory = after.peak_memory_mib / before.peak_memory_mib
    return Change(
        case=after.case,
        backend=after.backend,
        direction=after.direction,
        before_ms=before.timing.median_ms,
        after_ms=after.timing.median_ms,
        ratio=after.timing.median_ms / before.timing.median_ms,
        low=low,
        high=high,
        memory_ratio=memory,
    )


def count(changes: Sequence[Change], tolerance: float) -> dict[str, int]:
    """Rows by verdict."""
    verdicts = [change.verdict(tolerance) for change in changes]
    return {name: verdicts.count(name) for name in ('slower', 'same', 'faster')}
