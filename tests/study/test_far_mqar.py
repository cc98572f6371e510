"""The far-MQAR task: what is where in a sample, and that it can be answered from the far part alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hola_megatron.config import load_recipe
from hola_megatron.evaluate.recall.mqar import far_mqar
from hola_megatron.study.far_mqar import FarMqar

LENGTH, VOCABULARY, PAIRS = 1024, 8192, 128  # the fullest of the study: the questions fill the last quarter
TASK = FarMqar(pairs=[4, 8], test_pairs=[PAIRS], test_lengths=[1, 4])
RECIPE = Path(__file__).parents[2] / "recipes/studies/models/far_mqar.yaml"


def samples(pairs: int = PAIRS, rows: int = 6, length: int = LENGTH):
    return far_mqar(np.random.default_rng(0), rows=rows, length=length, vocabulary=VOCABULARY, pairs=pairs)


@pytest.mark.parametrize("pairs", [1, 16, PAIRS])
def test_answers_are_found_in_the_first_half_and_nowhere_else(pairs):
    drawn = samples(pairs)
    for row, asked, answers, stored in zip(drawn.tokens, drawn.asked, drawn.answers, drawn.stored, strict=True):
        assert len(np.unique(asked)) == pairs and asked.min() >= LENGTH * 3 // 4 and asked.max() < LENGTH - 1
        assert np.diff(asked).min(initial=2) >= 2 and np.diff(stored).min(initial=2) >= 2  # no overlaps
        assert stored.max() < LENGTH // 2 and stored.min() >= 1
        for place, answer in zip(asked, answers, strict=True):
            before = np.flatnonzero(row[:place] == row[place])
            assert len(before) == 1 and before[0] < LENGTH // 2  # the key: once, far away
            assert row[before[0] + 1] == answer == row[place + 1] and before[0] + 1 in stored


def test_keys_values_and_filler_are_three_parts_of_the_vocabulary():
    drawn, part = samples(16), VOCABULARY // 4
    keys = np.take_along_axis(drawn.tokens, drawn.asked, 1)
    assert keys.max() < part and drawn.answers.min() >= part and drawn.answers.max() < 2 * part
    rest = np.ones(drawn.tokens.shape, bool)
    for places in (drawn.asked, drawn.asked + 1, drawn.stored, drawn.stored - 1):
        np.put_along_axis(rest, places, False, 1)
    assert drawn.tokens[rest].min() >= 2 * part and drawn.tokens.max() < VOCABULARY
    assert rest.sum() == drawn.tokens.size - 6 * 4 * 16


def test_only_answers_have_a_loss_and_only_values_a_score():
    drawn = samples(16)
    labels = np.roll(drawn.tokens, -1, 1)
    assert (np.sort(labels[drawn.mask == 1]) == np.sort(drawn.answers.reshape(-1))).all()
    assert drawn.mask.sum() == drawn.score.sum() == 6 * 16
    assert (np.sort(drawn.tokens[drawn.score == 1]) == np.sort(drawn.answers.reshape(-1))).all()


def test_samples_depend_on_seed_and_step_alone_and_tests_on_neither():
    size = {"rows": 16, "length": 128, "vocabulary": 64}

    def tokens(seed: int, step: int) -> np.ndarray:
        return np.concatenate([group.tokens for group in TASK.training(seed=seed, step=step, **size)])

    assert (tokens(1, 5) == tokens(1, 5)).all()
    assert (tokens(1, 5) != tokens(1, 6)).any() and (tokens(1, 5) != tokens(2, 5)).any()
    groups = TASK.training(seed=1, step=5, **size)
    assert {group.asked.shape[1] for group in groups} == {4, 8} and sum(len(group.tokens) for group in groups) == 16
    whole = TASK.test(length=128, vocabulary=64, pairs=4, first=0, rows=5)
    part = TASK.test(length=128, vocabulary=64, pairs=4, first=3, rows=2)  # however a test is cut
    assert all((a[3:] == b).all() for a, b in zip(whole, part, strict=True))


def test_places_are_evenly_spread():
    drawn = samples(4, rows=4000, length=64)  # 4 pairs in 32 places
    counts = np.bincount(drawn.stored.reshape(-1) - 1, minlength=31)[:31]
    assert counts.sum() == 16_000 and counts[4:27].min() > 0.7 * counts[4:27].mean()


def test_what_does_not_fit_is_named():
    recipe = load_recipe(RECIPE)
    assert FarMqar(pairs=[64], test_pairs=[128]).problems(recipe, False) == []
    assert "129 pairs need" in FarMqar(pairs=[4], test_pairs=[129]).problems(recipe, False)[0]
    (problem,) = FarMqar(pairs=[4], test_pairs=[8]).problems(load_recipe(RECIPE, ["model.cache.block=256"]), False)
    assert "reach 320 tokens, and answers are 256 tokens away" in problem
    assert "model.cache.score: must be recency" in FarMqar(pairs=[4], test_pairs=[8]).problems(recipe, True)[0]
    (problem,) = TASK.problems(load_recipe(RECIPE, ["train.batch_ramp=[{batch: 64, steps: 9}]"]), False)
    assert problem.startswith("train.batch_ramp")
    (problem,) = TASK.problems(load_recipe(RECIPE, ["init.source=runs/x"]), False)
    assert problem.startswith("init.from")
    (problem,) = TASK.problems(load_recipe(RECIPE, ["data.documents=separate"]), False)
    assert problem.startswith("data.documents")
