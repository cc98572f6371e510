"""Associative recall on token ids: MQAR, and far-MQAR, whose answers lie far before the questions.

    MQAR (Arora et al. 2023, arXiv 2312.04927)
     k v k v k v k v . . k v . . . . k v . . . . . . . . k v . .    pairs first, soon asked for: gaps by a power law

    far-MQAR
    |<---- first half ---->|<-- nothing -->|<- last quarter ->|
     . k v . . k v . k v . . . . . . . . . . . k v . . k v . .
                                               ^ the value after the key is predicted; nothing else has a loss

Keys, values and filler are the first and second quarter and the second half of the vocabulary. Every key is asked once,
so a question's answer is in no earlier question. In far-MQAR no answer is in the local part or a recency list. A sample
is a function of the seeds given. For models that were trained on such samples (recipes/studies/far_mqar.yaml).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hola_megatron.errors import RecipeError

TEST_SEED = 20_261_130  # of the test samples, equal for all runs; training seeds have another first number
GAP_POWER = 0.01  # of MQAR: places of questions are drawn with probabilities of place ** (GAP_POWER - 1)


class Questions(NamedTuple):
    """B samples of T tokens with N questions each.

    tokens: int64 [B, T]. asked: int64 [B, N], places of the keys in the questions; the token after each is predicted.
    stored: int64 [B, N], places of the values where they are told.
    """

    tokens: np.ndarray
    asked: np.ndarray
    stored: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """float32 [B, T]: 1 where the next token is predicted."""
        mask = np.zeros(self.tokens.shape, np.float32)
        np.put_along_axis(mask, self.asked, 1.0, 1)
        return mask

    @property
    def answers(self) -> np.ndarray:
        """int64 [B, N]: the values asked for."""
        return np.take_along_axis(self.tokens, self.asked + 1, 1)

    @property
    def score(self) -> np.ndarray:
        """float32 [B, T]: 1 at the stored values, which an oracle keeps, 0 elsewhere."""
        score = np.zeros(self.tokens.shape, np.float32)
        np.put_along_axis(score, self.stored, 1.0, 1)
        return score


Sample = Callable[..., Questions]  # (rng, rows=, length=, vocabulary=, pairs=)


def far_mqar(rng: np.random.Generator, *, rows: int, length: int, vocabulary: int, pairs: int) -> Questions:
    """`rows` samples of far-MQAR of `length` tokens with `pairs` pairs each, from `rng` alone."""
    def places() -> tuple[np.ndarray, np.ndarray]:
        told = _places(rng, length // 2, pairs)
        return told, 3 * (length // 4) + _places(rng, length - 3 * (length // 4), pairs)

    return _samples(rng, places, rows, length, vocabulary, pairs)


def mqar(rng: np.random.Generator, *, rows: int, length: int, vocabulary: int, pairs: int) -> Questions:
    """The same of MQAR: the pairs come first."""
    def places() -> tuple[np.ndarray, np.ndarray]:
        room = (length - 2 * pairs) // 2
        weights = np.arange(1, room + 1) ** (GAP_POWER - 1.0)
        return 2 * np.arange(pairs), 2 * (pairs + rng.choice(room, pairs, replace=False, p=weights / weights.sum()))

    return _samples(rng, places, rows, length, vocabulary, pairs)


def _samples(rng: np.random.Generator, places: Callable[[], tuple[np.ndarray, np.ndarray]], rows: int, length: int,
             vocabulary: int, pairs: int) -> Questions:
    part = vocabulary // 4
    tokens = rng.integers(2 * part, vocabulary, (rows, length))
    stored, asked = np.empty((2, rows, pairs), np.int64)
    for row in range(rows):
        keys = rng.choice(part, pairs, replace=False)
        values = part + rng.integers(0, part, pairs)
        stored[row], asked[row] = places()
        order = rng.permutation(pairs)
        for at, chosen in ((stored[row], slice(None)), (asked[row], order)):
            tokens[row, at], tokens[row, at + 1] = keys[chosen], values[chosen]
    return Questions(tokens, asked, stored + 1)


def fixed_samples(sample: Sample, *, length: int, vocabulary: int, pairs: int, first: int, rows: int) -> Questions:
    """Test samples `first` .. `first + rows - 1`, the same for every model."""
    drawn = [sample(np.random.default_rng([0, TEST_SEED, length, pairs, number]), rows=1, length=length,
                    vocabulary=vocabulary, pairs=pairs) for number in range(first, first + rows)]
    return Questions(*(np.concatenate(part) for part in zip(*drawn, strict=True)))


def check(length: int, pairs: int, vocabulary: int) -> None:
    """RecipeError where samples of either kind cannot be made."""
    if length % 4 or 2 * pairs > length // 4:
        raise RecipeError(f"--pairs: {pairs} pairs need a length that is a multiple of 4 and at least {8 * pairs}, not "
                          f"{length}; give fewer, or a longer one")
    if pairs > vocabulary // 4:
        raise RecipeError(f"--pairs: {pairs} pairs need as many keys, a quarter of the vocabulary of {vocabulary}; "
                          "give fewer")


def _places(rng: np.random.Generator, length: int, pairs: int) -> np.ndarray:
    """Starts of `pairs` neighbours of two tokens in 0 .. length - 1 without overlap, every choice equally likely."""
    return np.sort(rng.choice(length - pairs, pairs, replace=False)) + np.arange(pairs)
