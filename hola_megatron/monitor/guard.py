"""Judging a step's numbers before the update is made.

A step is bad when its loss or gradient norm is not finite, or lies far above the recent ones:
more than so many median absolute deviations (MAD) above the median of the last accepted steps.
Bad steps never enter that window, so a burst of them cannot make itself look normal. Loss and
gradient norm are the same numbers on every rank, and so is the judgement.
"""

from __future__ import annotations

import math
import statistics

from hola_megatron.config import GuardConfig

NORMAL = 1.4826  # MAD of a normal distribution times this is its standard deviation
# a run of nearly equal values has a MAD near zero; less than this share of the median is never far
LEAST_SPREAD = {"loss": 0.005, "grad_norm": 0.05}


class NumberGuard:
    """Keeps the window; `judge` asks, `accept` remembers. `history` is what a checkpoint keeps."""

    def __init__(self, config: GuardConfig, history: dict[str, list[float]] | None = None):
        self.config = config
        history = history or {}
        self._window = {name: list(history.get(name, []))[-config.window:] for name in LEAST_SPREAD}

    @property
    def history(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._window.items()}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with these numbers ("loss nan is not finite"), or None."""
        for name, value, limit in (("loss", loss, self.config.loss_mads), ("grad_norm", grad_norm,
                                                                          self.config.grad_mads)):
            if not math.isfinite(value):
                return f"{name} {value} is not finite"
            highest = self.highest(name, limit)
            if value > highest:
                return f"{name} {value:.4g} is above {highest:.4g}, {limit:g} deviations over the median of the " \
                       f"last {len(self._window[name])} good steps"
        return None

    def highest(self, name: str, mads: float | None) -> float:
        """The largest value that is no spike; inf while there is too little history, or with mads None."""
        values = self._window[name]
        if mads is None or len(values) < self.config.warmup:
            return math.inf
        median = statistics.median(values)
        mad = statistics.median(abs(value - median) for value in values)
        return median + mads * NORMAL * max(mad, LEAST_SPREAD[name] * abs(median))

    def accept(self, loss: float, grad_norm: float) -> None:
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            self._window[name] = [*self._window[name][1 - self.config.window:], value]
