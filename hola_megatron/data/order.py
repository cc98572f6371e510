"""The order of samples: pure functions of (seed, global sample index).

The global sample index g counts the samples of a run from 0. Nothing here knows of ranks, batches
or restarts, so neither can any of them change the order.

Random numbers are the raw output of Philox, a counter-based generator, addressed by what they are
for: key = (seed, purpose), counter = (epoch or cycle, window, stream). Only raw bits are used, whose
values numpy guarantees for ever; its shuffling methods may change between versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from hola_megatron.errors import RecipeError

SHARDS_PER_WINDOW = 8
CYCLE = 1000

_SHARDS, _WINDOW, _CYCLE = 1, 2, 3


def _permutation(length: int, *, seed: int, purpose: int, major: int, minor: int = 0, stream: int = 0) -> np.ndarray:
    """A permutation of 0..length - 1, int64 [length]."""
    # The generator increments word 0 of the counter, so the addresses below never overlap.
    counter = np.array([0, major, minor, stream], np.uint64)
    bits = np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter).random_raw(length)
    return np.argsort(bits, kind="stable")


class SampleOrder:
    """The order in which one dataset's samples are read, epoch after epoch.

    Each epoch is a permutation: the shards are shuffled and cut into windows of SHARDS_PER_WINDOW,
    and the samples of a window are shuffled among each other. So only a few shards are read from
    (and need to be downloaded) at a time, while neighbours in the files are far apart in training.

    Args:
        shard_sizes: samples of each shard (> 0).
        seed: 0 .. 2**64 - 1.
        stream: number of the dataset in a mixture, so that equal datasets get different orders.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, stream: int = 0):
        self._sizes = np.array(shard_sizes, np.int64)
        self._begins = np.cumsum(self._sizes) - self._sizes
        self._seed, self._stream = seed, stream
        self.samples = int(self._sizes.sum())
        # Sequential use needs one window at a time; two of each keep a step across an edge cheap.
        self._epoch = lru_cache(2)(self._shuffle_shards)
        self._window = lru_cache(2)(self._shuffle_window)

    def __getitem__(self, g: int) -> int:
        """The dataset index of the g-th sample read (g >= 0, without end)."""
        epoch, position = divmod(g, self.samples)
        _, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, position, side="right"))
        start = int(ends[window - 1]) if window else 0
        return int(self._window(epoch, window)[position - start])

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard order of the epoch, position at which each window ends)."""
        order = _permutation(len(self._sizes), seed=self._seed, purpose=_SHARDS, major=epoch, stream=self._stream)
        ends = np.cumsum(self._sizes[order])
        last = np.minimum(np.arange(SHARDS_PER_WINDOW, len(order) + SHARDS_PER_WINDOW, SHARDS_PER_WINDOW), len(order))
        return order, ends[last - 1]

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        """The dataset indices of one window, in reading order."""
        order, _ = self._epoch(epoch)
        shards = order[window * SHARDS_PER_WINDOW : (window + 1) * SHARDS_PER_WINDOW]
        indices = np.concatenate([np.arange(self._begins[s], self._begins[s] + self._sizes[s]) for s in shards])
        shuffle = _permutation(
            len(indices), seed=self._seed, purpose=_WINDOW, major=epoch, minor=window, stream=self._stream
        )
        return indices[shuffle]


class StreamOrder:
    """Which of several streams each global sample is taken from.

    Samples are divided into cycles of CYCLE samples. Every cycle has the same number of samples of each
    stream (its weight, rounded by largest remainder) in an order of its own, so the proportions hold
    exactly after each cycle and nearly in between.

    Args:
        weights: relative weights, each worth at least one sample of a cycle.
        seed: 0 .. 2**64 - 1.
        names: for errors.

    Raises:
        RecipeError: a weight is not a positive number or too small.
    """

    def __init__(self, weights: Sequence[float], seed: int, names: Sequence[str]):
        self.counts = _shares(weights, names)
        self._seed = seed
        self._cycle = lru_cache(2)(self._shuffle_cycle)

    def locate(self, g: int) -> tuple[int, int]:
        """(stream, how many samples of that stream come before global sample g)."""
        cycle, position = divmod(g, CYCLE)
        streams, ranks = self._cycle(cycle)
        stream = int(streams[position])
        return stream, cycle * int(self.counts[stream]) + int(ranks[position])

    def taken(self, samples: int) -> list[int]:
        """Samples of each stream among the first `samples` global samples."""
        cycle, position = divmod(samples, CYCLE)
        streams, _ = self._cycle(cycle)
        part = np.bincount(streams[:position], minlength=len(self.counts))
        return [int(n) for n in cycle * self.counts + part]

    def _shuffle_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """(stream, rank within the stream) of each sample of a cycle."""
        return _shuffled(self.counts, self._seed, cycle)


class BudgetOrder:
    """Which of several streams each sample of a phase is taken from, where each stream gives a number of samples.

    As far as the numbers allow, every stretch of the phase has the streams in these proportions: sample k of a stream
    with c samples falls due at (2 k + 1) / (2 c) of the phase, and samples come in the order of these times (equal ones
    by stream), shuffled within cycles of CYCLE samples.

    Args:
        counts: samples of each stream (> 0).
        seed: 0 .. 2**64 - 1.
    """

    def __init__(self, counts: Sequence[int], seed: int):
        self.counts, self.total = [int(count) for count in counts], sum(counts)
        self._seed = seed
        self._cycle = lru_cache(2)(self._shuffle_cycle)

    def locate(self, g: int) -> tuple[int, int]:
        """(stream, how many samples of that stream come before sample g), 0 <= g < total."""
        cycle, position = divmod(g, CYCLE)
        streams, numbers = self._cycle(cycle)
        return int(streams[position]), int(numbers[position])

    def taken(self, samples: int) -> list[int]:
        """Samples of each stream among the first `samples` (<= total)."""
        cycle, position = divmod(samples, CYCLE)
        before = self._due(cycle * CYCLE)
        if not position:
            return before
        part = np.bincount(self._cycle(cycle)[0][:position], minlength=len(self.counts))
        return [done + int(n) for done, n in zip(before, part, strict=True)]

    def _due(self, samples: int) -> list[int]:
        """Samples of each stream among the first `samples` by their times, before shuffling."""
        samples = min(samples, self.total)
        taken = [(2 * samples * count + self.total) // (2 * self.total) for count in self.counts]
        while (excess := sum(taken) - samples) != 0:
            step = 1 if excess < 0 else -1
            times = [(Fraction(2 * n + step, 2 * count), stream)
                     for stream, (n, count) in enumerate(zip(taken, self.counts, strict=True))
                     if 0 <= n + step <= count]
            taken[(min(times) if step > 0 else max(times))[1]] += step
        return taken

    def _shuffle_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """(stream, number within the stream) of each sample of a cycle; the last one may be shorter."""
        first, last = self._due(cycle * CYCLE), self._due((cycle + 1) * CYCLE)
        counts = [after - before for before, after in zip(first, last, strict=True)]
        streams, ranks = _shuffled(counts, self._seed, cycle)
        return streams, ranks + np.array(first, np.int64)[streams]


def _shuffled(counts: Sequence[int], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """(stream, rank within the stream) of each sample of a cycle with `counts` samples of each stream."""
    streams = np.repeat(np.arange(len(counts)), counts)
    streams = streams[_permutation(len(streams), seed=seed, purpose=_CYCLE, major=cycle)]
    ranks = np.empty(len(streams), np.int64)
    for stream, count in enumerate(counts):
        ranks[streams == stream] = np.arange(count)
    return streams, ranks


def _shares(weights: Sequence[float], names: Sequence[str]) -> np.ndarray:
    """CYCLE split in proportion to `weights` by largest remainder, int64 [streams]."""
    bad = [
        f"weight of {n}: {w}, must be a number above 0"
        for n, w in zip(names, weights, strict=True)
        if not 0 < w < np.inf
    ]
    if bad:
        raise RecipeError(bad)
    exact = CYCLE * np.array(weights, np.float64) / np.sum(weights)
    counts = np.floor(exact).astype(np.int64)
    # A stable sort gives equal remainders to the earlier stream.
    counts[np.argsort(counts - exact, kind="stable")[: CYCLE - counts.sum()]] += 1
    small = [
        f"weight of {n}: {w} is under 1/{CYCLE} of the mixture; raise it or leave the stream out"
        for n, w, count in zip(names, weights, counts, strict=True)
        if count == 0
    ]
    if small:
        raise RecipeError(small)
    return counts
