"""Planned phases: every stream gives exactly its samples over any stop, and only what has not begun may change."""

from __future__ import annotations

import json
import random
from fractions import Fraction

import pytest

from hola_megatron.data.order import CYCLE, BudgetOrder, SampleOrder
from hola_megatron.data.phases import Phases
from hola_megatron.data.stream import Mixture, PackedDataset
from hola_megatron.errors import CheckpointError, RecipeError

SEED = 5
COUNTS = [[1], [7, 3], [1, 1, 1], [2500, 1, 499], [1000, 1000], [999, 2], [1, 5000], [3, 4, 1993, 1]]


@pytest.fixture(scope="module")
def parts(text_data) -> dict[str, PackedDataset]:
    return {name: PackedDataset(str(text_data / name)) for name in ("train", "valid")}


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_a_phase_reads_every_sample_of_its_budget_once(counts):
    order = BudgetOrder(counts, SEED)
    read = [order.locate(g) for g in range(sum(counts))]
    for stream, count in enumerate(counts):
        assert sorted(k for s, k in read if s == stream) == list(range(count))
    for samples in {0, 1, len(read) // 3, len(read) - 1, len(read), min(CYCLE, len(read)), min(CYCLE + 1, len(read))}:
        assert order.taken(samples) == [sum(s == stream for s, _ in read[:samples]) for stream in range(len(counts))]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_streams_are_due_evenly(counts):
    """Cycle by cycle the definition: samples sorted by (2 k + 1) / (2 c), equal ones by stream."""
    due = sorted((Fraction(2 * k + 1, 2 * count), stream) for stream, count in enumerate(counts) for k in range(count))
    order = BudgetOrder(counts, SEED)
    for end in range(0, len(due) + CYCLE, CYCLE):
        wanted = [sum(s == stream for _, s in due[:end]) for stream in range(len(counts))]
        assert order.taken(min(end, len(due))) == wanted


def test_huge_budgets_are_located_at_once():
    counts = [4 * 10**8, 10**8 + 1, 7]
    order = BudgetOrder(counts, SEED)
    assert order.taken(sum(counts)) == counts
    stream, k = order.locate(sum(counts) - 1)
    assert k < counts[stream] and order.taken(sum(counts) // 2)[0] == pytest.approx(counts[0] // 2, abs=CYCLE)


def planned(parts, budgets: list[list[tuple[str, int]]], tail: str = "train") -> Mixture:
    return Mixture([parts[tail]], [1.0], seed=SEED,
                   budgets=[[(parts[name], count) for name, count in phase] for phase in budgets])


def restarted(mixture: Mixture, before: Mixture, samples: int, begin: int = 0) -> Mixture:
    return mixture.going_on(Phases.from_dicts(json.loads(json.dumps(before.phases.to_dicts()))), samples, begin)


PLAN = [[("train", 600), ("valid", 200)], [("valid", 300)], [("valid", 1), ("train", 1)]]


def test_the_tokens_of_every_phase_are_exact(parts):
    mixture = planned(parts, PLAN)
    assert mixture.names == ["train", "valid"]
    for samples, train, valid in ((0, 0, 0), (800, 600, 200), (1100, 600, 500), (1102, 601, 501), (1200, 699, 501)):
        assert mixture.samples_per_stream(samples) == [train, valid]
        assert mixture.tokens_per_stream(samples) == [64 * train, 64 * valid]
    read = [mixture.locate(g) for g in range(1300)]
    for stream, data in enumerate((parts["train"], parts["valid"])):  # each goes on where the phase before left it
        mine = [index for s, index in read if s == stream]
        order = SampleOrder(data.shard_sizes, SEED, stream=stream)
        first = (600, 200)[stream]  # of the first phase
        assert sorted(mine[:first]) == sorted(order[k] for k in range(first))
        assert sorted(mine) == sorted(order[k] for k in range(len(mine)))
    assert {s for s, _ in read[:50]} == {0, 1} and {s for s, _ in read[800:1100]} == {1}


@pytest.mark.parametrize("samples", [0, 1, 799, 800, 801, 1100, 1101, 1102, 1250])
def test_a_restart_changes_nothing(samples, parts):
    mixture = planned(parts, PLAN)
    again = restarted(planned(parts, PLAN), mixture, samples)
    assert again.phases.to_dicts() == mixture.phases.to_dicts()
    assert [again.locate(g) for g in range(1300)] == [mixture.locate(g) for g in range(1300)]


def test_phases_that_have_not_begun_may_change(parts):
    mixture = planned(parts, PLAN)
    other = restarted(planned(parts, [PLAN[0], [("train", 100)]]), mixture, 500)
    assert [other.locate(g) for g in range(800)] == [mixture.locate(g) for g in range(800)]
    assert other.samples_per_stream(900) == [700, 200] and other.samples_per_stream(1000) == [800, 200]
    tail = restarted(planned(parts, PLAN, tail="valid"), mixture, 1102)
    assert dict(zip(tail.names, tail.samples_per_stream(1202), strict=True)) == {"valid": 601, "train": 601}
    with pytest.raises(RecipeError, match=r"data\.phases\.0: is another phase than the one in which the run has read "
                                          "500 samples"):
        restarted(planned(parts, [[("train", 601), ("valid", 199)]]), mixture, 500)
    ended = restarted(planned(parts, []), mixture, 500)  # no phases any more: data.train from here on
    assert ended.samples_per_stream(600)[0] == mixture.samples_per_stream(500)[0] + 100


def test_a_plan_counts_from_the_run_s_own_first_step(parts):
    """As after init.from: what the earlier run read is kept, and the phases are whole."""
    before = planned(parts, [])
    new = restarted(planned(parts, PLAN), before, 700, begin=700)
    assert new.samples_per_stream(700) == [700, 0] and new.samples_per_stream(1500) == [1300, 200]
    again = restarted(planned(parts, PLAN), new, 900, begin=700)
    assert again.phases.to_dicts() == new.phases.to_dicts()


def test_the_fingerprint_is_of_the_whole_plan(parts):
    plans = [[], PLAN, PLAN[:2], [[("train", 601), ("valid", 200)], *PLAN[1:]],
             [[("valid", 1), ("train", 1)]], [[("valid", 1)], [("train", 1)]]]
    assert len({planned(parts, plan).fingerprint for plan in plans}) == len(plans)
    assert planned(parts, []).fingerprint == Mixture([parts["train"]], [3.0], seed=9).fingerprint


def test_phases_of_a_checkpoint_that_leave_a_gap_are_named(parts):
    stored = planned(parts, PLAN).phases.to_dicts()
    stored[1]["first_sample"] += 1
    with pytest.raises(CheckpointError, match=r"trainer\.phases: one ends before the next begins"):
        Phases.from_dicts(stored)


def test_random_plans_and_stops_give_the_budgets(parts):
    draw = random.Random(3)
    for _ in range(5):
        plan = [[(name, draw.randint(1, 300)) for name in draw.sample(["train", "valid"], draw.randint(1, 2))]
                for _ in range(draw.randint(1, 4))]
        mixture, read, g = planned(parts, plan), [], 0
        total = sum(count for phase in plan for _, count in phase)
        while g < total:
            mixture = restarted(planned(parts, plan), mixture, g)
            length = draw.randint(1, 200)
            read += [mixture.datasets[mixture.locate(n)[0]].path for n in range(g, min(g + length, total))]
            g += length
        for name in ("train", "valid"):
            wanted = sum(count for phase in plan for other, count in phase if other == name)
            assert read.count(parts[name].path) == wanted
