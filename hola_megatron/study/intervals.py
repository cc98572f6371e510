"""Means over seeds with intervals of Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
_STEPS = 2000  # of Simpson's rule; even


@dataclass(frozen=True)
class Interval:
    """mean +- half over `count` values; half is None for one value, which says nothing about its spread."""

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return text(self.mean) if self.half is None else f"{text(self.mean)} ± {text(self.half)}"


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of independent values and its interval at `level`. values: one or more."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, n)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    return Interval(mean, t_quantile(0.5 + level / 2, n - 1) * spread / math.sqrt(n), n)


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with `freedom` degrees of freedom, for a probability of 0.5 up to 1.

    With x = sqrt(freedom) tan(a) the density becomes c cos(a)^(freedom - 1), which is integrated from 0.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if 0.5 + _area(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _area(end: float, freedom: int) -> float:
    """Probability of 0 to sqrt(freedom) tan(end), by Simpson's rule."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    step = end / _STEPS
    heights = [math.cos(i * step) ** (freedom - 1) * (1 if i in (0, _STEPS) else 4 if i % 2 else 2)
               for i in range(_STEPS + 1)]
    return scale * step / 3 * math.fsum(heights)


def text(value: float) -> str:
    """Three decimals, or four digits of a large number."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
