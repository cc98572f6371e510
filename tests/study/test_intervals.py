"""Intervals against tables of Student's t, decision rules against results made by hand."""

from __future__ import annotations

import math

import pytest

from hola_megatron.study.intervals import interval, t_quantile
from hola_megatron.study.rules import judge
from hola_megatron.study.table import load_study


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423)])
def test_quantiles_of_t(freedom, quantile):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-4)
    assert t_quantile(0.995, freedom) > quantile > t_quantile(0.95, freedom)


def test_an_interval():
    found = interval([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3) and found.count == 3
    assert found.half == pytest.approx(4.30265 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-4)
    assert interval([5.0]).half is None and str(interval([5.0])) == "5.000"


MEASURE = "accuracy/length_64/pairs_32"
RULE = {"name": "pays", "arm": "betae", "than": ["recency", "random"], "measure": MEASURE, "by": 0.2, "in_seeds": 2}


@pytest.fixture
def study(make):
    arms = [{"name": name} for name in ("betae", "recency", "random")]
    return load_study(make(arms=arms, rules=[RULE], seeds=[1, 2, 3]))


def results(**arms):
    return {arm: {seed: {MEASURE: x} for seed, x in enumerate(values, 1) if x is not None}
            for arm, values in arms.items()}


@pytest.mark.parametrize(("betae", "recency", "random", "answer", "seeds"), [
    ([0.9, 0.9, 0.1], [0.5, 0.6, 0.1], [0.1, 0.1, 0.1], "yes", [1, 2]),
    ([0.9, 0.9, 0.1], [0.5, 0.6, 0.1], [0.8, 0.1, 0.1], "no", [2]),  # better than one of the two is not enough
    ([0.9, 0.9, None], [0.5, 0.6, 0.1], [0.8, 0.1, 0.1], "undecided", [2]),
    ([0.9, 0.9, None], [0.5, 0.6, 0.1], [0.1, 0.1, 0.1], "yes", [1, 2]),  # whatever the third says
    ([0.1, 0.1, None], [0.5, 0.6, 0.1], [0.1, 0.1, 0.1], "no", []),
    ([], [], [], "undecided", []),
])
def test_rules(study, betae, recency, random, answer, seeds):
    verdict = judge(study, study.rules[0], results(betae=betae, recency=recency, random=random))
    assert (verdict.answer, verdict.seeds) == (answer, seeds)


def test_a_rule_about_a_loss(make):
    rule = {**RULE, "than": ["recency"], "higher_is_better": False}
    study = load_study(make(arms=[{"name": "betae"}, {"name": "recency"}], rules=[rule]))
    assert judge(study, study.rules[0], results(betae=[1.0, 1.0], recency=[1.3, 1.2])).answer == "yes"
    assert judge(study, study.rules[0], results(betae=[1.3, 1.2], recency=[1.0, 1.0])).answer == "no"
