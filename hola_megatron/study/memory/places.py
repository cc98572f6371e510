"""Where in a text something is gained: by place in the block, and by where the coming bigram occurred last.

A prediction is named by the position p of its input: from tokens 0 .. p of the window, token p + 1 is predicted. Its
coming bigram is (token p, token p + 1); it occurred last where the same two tokens ended last before, at position j.

Shapes: R windows, T predictions of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NEVER, INSIDE, EARLIER = 0, 1, 2
NAMES = ("never", "inside the local part", "earlier")
OFFSET_BINS = 16
DISTANCES = (1, 4, 16, 64, 256, 1024, 4096, 16384, 1 << 40)


@dataclass(frozen=True)
class Mean:
    """A mean over `count` tokens with its standard error; None where there are too few."""

    mean: float | None
    error: float | None
    count: int

    @classmethod
    def of(cls, values: np.ndarray) -> Mean:
        if not values.size:
            return cls(None, None, 0)
        error = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else None
        return cls(float(values.mean()), error, int(values.size))


def last_occurrences(tokens: np.ndarray) -> np.ndarray:
    """int64 [R, T]: j for each prediction of tokens [R, T + 1], -1 where the bigram never occurred in the window."""
    found = np.full((len(tokens), tokens.shape[1] - 1), -1, np.int64)
    for row, its in zip(found, tokens.tolist(), strict=True):
        ends: dict[tuple[int, int], int] = {}
        for p in range(len(row)):
            if p:
                ends[its[p - 1], its[p]] = p
            row[p] = ends.get((its[p], its[p + 1]), -1)
    return found


def categories(last: np.ndarray, local_start: Callable[[int], int]) -> np.ndarray:
    """NEVER, INSIDE or EARLIER for each prediction.

    last: as from `last_occurrences`. local_start: position -> the first token that is in its local part.
    """
    starts = np.array([local_start(p) for p in range(last.shape[1])])
    return np.where(last < 0, NEVER, np.where(last >= starts[None], INSIDE, EARLIER))


def by_category(values: np.ndarray, kinds: np.ndarray) -> dict[str, Mean]:
    return {name: Mean.of(values[kinds == number]) for number, name in enumerate(NAMES)}


def by_distance(values: np.ndarray, last: np.ndarray) -> list[tuple[int, int, Mean]]:
    """(from, below, mean) of values whose bigram occurred last at such a distance in tokens."""
    distance = np.arange(1, last.shape[1] + 1)[None] - last
    found = []
    for low, high in zip(DISTANCES, DISTANCES[1:], strict=False):
        chosen = values[(last >= 0) & (distance >= low) & (distance < high)]
        if chosen.size:
            found.append((low, high, Mean.of(chosen)))
    return found


def by_offset(values: np.ndarray, block: int) -> list[tuple[int, int, Mean]]:
    """(from, below, mean) by position modulo `block`, in at most OFFSET_BINS parts."""
    size = -(-block // OFFSET_BINS)
    offset = np.arange(values.shape[1]) % block
    return [(low, min(low + size, block), Mean.of(values[:, (offset >= low) & (offset < low + size)].ravel()))
            for low in range(0, block, size)]


def oracle_scores(tokens: np.ndarray, local_start: Callable[[int], int]) -> np.ndarray:
    """float64 [R, T]: how often the bigram that ends at each position comes again where it is not local any more.

    An oracle that has read the whole window keeps the tokens of largest score: those that later predictions can use.
    Among equals the later token is preferred.
    """
    length = tokens.shape[1] - 1
    starts = [local_start(p) for p in range(length)]
    scores = np.zeros((len(tokens), length))
    for score, its in zip(scores, tokens.tolist(), strict=True):
        ends: dict[tuple[int, int], list[int]] = {}
        for p in range(length):
            if p:
                ends.setdefault((its[p - 1], its[p]), []).append(p)
            for j in ends.get((its[p], its[p + 1]), ()):
                score[j] += j < starts[p]
    return scores + np.arange(length) / (2 * length)
