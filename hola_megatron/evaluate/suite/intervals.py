"""95 % intervals of a task's numbers over its items.

    wilson      of a share of right answers: every item is right or wrong
    bootstrap   of anything else (perplexities, mean shares): percentiles of the metric over resampled items

They say how far the number may lie from that of infinitely many such items, for this one model; seeds of training are
another matter (tools/experiment.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z = 1.959963984540054  # of 95 %
RESAMPLES, SEED = 1000, 0


@dataclass(frozen=True)
class Measure:
    """A number of a task; low and high: its interval, None where there is none; how: the method's name, or ""."""

    value: float
    low: float | None = None
    high: float | None = None
    how: str = ""

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return shown(self.value)
        return f"{shown(self.value)} [{shown(self.low)}, {shown(self.high)}]"


def shown(value: float) -> str:
    """Three decimals below 10, and at least four digits above."""
    if not math.isfinite(value) or abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.2f}"


def wilson(right: float, items: int) -> tuple[float, float]:
    """Wilson's interval of the share right / items; items at least 1."""
    share, spread = right / items, Z * Z / items
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / items + spread / items / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap(values: Sequence[Any], statistic: Callable[[list[Any]], float]) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of `statistic` over RESAMPLES draws of as many items, with replacement."""
    draw = np.random.default_rng(SEED)
    found = []
    for _ in range(RESAMPLES):
        found.append(float(statistic([values[n] for n in draw.integers(0, len(values), len(values))])))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def measured(value: float, values: Sequence[Any] | None, statistic: Callable[[list[Any]], float] | None) -> Measure:
    """A metric with the interval that fits its items.

    Args:
        value: the metric.
        values: of the items; None or one alone: no interval.
        statistic: makes the metric of `values`; None: their mean.
    """
    if values is None or len(values) < 2:
        return Measure(value)
    if all(isinstance(x, (bool, int, float, np.number)) and x in (0, 1) for x in values):
        share = sum(map(float, values)) / len(values)
        if math.isclose(share, value, abs_tol=1e-9):
            return Measure(value, *wilson(sum(map(float, values)), len(values)), "wilson")
    of_items = statistic or (lambda items: sum(map(float, items)) / len(items))
    if not math.isclose(float(of_items(list(values))), value, rel_tol=1e-6, abs_tol=1e-9):
        return Measure(value)  # the metric is no function of these values
    return Measure(value, *bootstrap(values, of_items), "bootstrap")
