"""Samples of time and what is said about them."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
    """All samples of one measurement, in milliseconds and in the order taken."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return self._quantile(0.5)

    @property
    def p20_ms(self) -> float:
        return self._quantile(0.2)

    @property
    def p80_ms(self) -> float:
        return self._quantile(0.8)

    @property
    def mean_ms(self) -> float:
        return sum(self.samples_ms) / len(self.samples_ms)

    def _quantile(self, q: float) -> float:
        return float(np.quantile(self.samples_ms, q))
