"""Detection of bad steps, before the update is made.

A step is bad when its loss or gradient norm is not finite, or is more than a number of median absolute deviations (MAD)
above the median of the last accepted steps. Bad steps do not enter that window, so a series of them cannot shift it.
Loss and gradient norm are equal on every rank, and so is the decision.
"""

from __future__ import annotations

import math
import statistics

from hola_megatron.recipe.schema import GuardConfig

NORMAL = 1.4826  # MAD of a normal distribution times this is its standard deviation
# nearly equal values have a MAD near zero; the spread is at least this fraction of the median
MIN_SPREAD = {"loss": 0.005, "grad_norm": 0.05}


class NumberGuard:
    """A window of accepted losses and gradient norms: `judge` compares with it, `accept` appends to it.

    history: a saved window, as from `history`; None: empty.
    """

    def __init__(self, config: GuardConfig, history: dict[str, list[float]] | None = None):
        self.config = config
        history = history or {}
        self._window = {name: list(history.get(name, []))[-config.window:] for name in MIN_SPREAD}

    @property
    def history(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._window.items()}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """The problem of these values ("loss nan is not finite"), or None."""
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
        """The largest accepted value; inf while there are fewer than `warmup` values, or where mads is None."""
        values = self._window[name]
        if mads is None or len(values) < self.config.warmup:
            return math.inf
        median = statistics.median(values)
        mad = statistics.median(abs(value - median) for value in values)
        return median + mads * NORMAL * max(mad, MIN_SPREAD[name] * abs(median))

    def accept(self, loss: float, grad_norm: float) -> None:
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            self._window[name] = [*self._window[name][1 - self.config.window:], value]
