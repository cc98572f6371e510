"""Places of a text: by brute force on texts that repeat a lot."""

from __future__ import annotations

import numpy as np
import pytest

from hola_megatron.study.memory.places import (
    EARLIER,
    INSIDE,
    NEVER,
    Mean,
    by_category,
    by_distance,
    by_offset,
    categories,
    last_occurrences,
    oracle_scores,
)

TOKENS = np.random.default_rng(0).integers(0, 5, (3, 61))
LENGTH, BLOCK = 60, 16


def start(position: int) -> int:
    return position // BLOCK * BLOCK


def ends_of(row: np.ndarray, p: int) -> list[int]:
    """Positions up to p at which the bigram that p predicts ended before."""
    return [j for j in range(1, p + 1) if row[j - 1] == row[p] and row[j] == row[p + 1]]


def test_last_occurrences_and_categories():
    last = last_occurrences(TOKENS)
    kinds = categories(last, start)
    for r, row in enumerate(TOKENS):
        for p in range(LENGTH):
            found = ends_of(row, p)
            assert last[r, p] == (found[-1] if found else -1)
            assert kinds[r, p] == (NEVER if not found else INSIDE if found[-1] >= start(p) else EARLIER)
    assert {NEVER, INSIDE, EARLIER} == set(kinds.ravel())


def test_an_oracle_counts_the_predictions_that_need_a_token_after_it_is_not_local_any_more():
    scores = oracle_scores(TOKENS, start)
    for r, row in enumerate(TOKENS):
        wanted = [sum(j in ends_of(row, p) and j < start(p) for p in range(LENGTH)) for j in range(LENGTH)]
        assert np.floor(scores[r]).tolist() == wanted and max(wanted) > 0
        equal = [j for j in range(LENGTH) if wanted[j] == max(wanted)]
        assert scores[r, equal].argmax() == len(equal) - 1  # the latest


def test_means_by_offset_and_distance_hold_every_token_once():
    values, last = np.random.default_rng(1).normal(size=(3, LENGTH)), last_occurrences(TOKENS)
    offsets = by_offset(values, BLOCK)
    assert [(low, high) for low, high, _ in offsets] == [(i, i + 1) for i in range(BLOCK)]
    assert offsets[3][2].mean == pytest.approx(values[:, 3::BLOCK].mean()) and offsets[3][2].count == 12
    assert sum(mean.count for _, _, mean in by_offset(values, 50)) == values.size
    distances = by_distance(values, last)
    assert sum(mean.count for _, _, mean in distances) == (last >= 0).sum()
    low, high, mean = distances[1]
    chosen = [values[r, p] for r in range(3) for p in range(LENGTH) if last[r, p] >= 0
              and low <= p + 1 - last[r, p] < high]
    assert (low, high) == (4, 16) and mean.mean == pytest.approx(np.mean(chosen)) and mean.count == len(chosen)
    kinds = by_category(values, categories(last, start))
    assert sum(m.mean * m.count for m in kinds.values()) == pytest.approx(values.sum())


def test_a_mean_has_its_standard_error():
    found = Mean.of(np.array([1.0, 2.0, 4.0]))
    assert found.mean == pytest.approx(7 / 3) and found.error == pytest.approx(np.sqrt(7 / 3 / 3))
    assert Mean.of(np.array([1.0])) == Mean(1.0, None, 1) and Mean.of(np.array([])) == Mean(None, None, 0)
