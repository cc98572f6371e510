"""A mixture changed on the way: every stream goes on where it was read to, whatever the restarts."""

from __future__ import annotations

import json

import pytest

from hola_megatron.data.order import SampleOrder
from hola_megatron.data.phases import Phases
from hola_megatron.data.stream import BatchLoader, Mixture, PackedDataset
from hola_megatron.errors import CheckpointError, DataError

SEED = 11


@pytest.fixture(scope="module")
def parts(text_data) -> dict[str, PackedDataset]:
    """Two datasets, of which the second is read through more than once below."""
    return {name: PackedDataset(str(text_data / name)) for name in ("train", "valid")}


def changed(before: Mixture, samples: int, datasets: list[PackedDataset], weights: list[float], seed: int = SEED,
            ) -> Mixture:
    """As a restarted program makes it: from the datasets, and the phases as a checkpoint's JSON holds them."""
    stored = json.loads(json.dumps(before.phases.to_dicts()))
    return Mixture(datasets, weights, seed=seed).going_on(Phases.from_dicts(stored), samples)


def test_a_stream_that_joins_begins_at_its_start_and_the_other_goes_on(parts):
    """800 samples of A, then A and B in equal parts: the whole is A's order without a break, and B's from its start."""
    a, b = parts["train"], parts["valid"]
    alone = Mixture([a], [1.0], seed=SEED)
    both = changed(alone, 800, [a, b], [1, 1])
    read = [both.locate(g) for g in range(1400)]
    assert read[:800] == [alone.locate(g) for g in range(800)]
    for stream, data in enumerate((a, b)):
        mine = [index for s, index in read if s == stream]
        order = SampleOrder(data.shard_sizes, SEED, stream=stream)
        assert mine == [order[k] for k in range(len(mine))] and len(mine) > 250
        assert len(set(mine[:len(data)])) == min(len(mine), len(data)), "read again before its epoch has ended"
    counts = [sum(s == stream for s, _ in read) for stream in (0, 1)]
    assert both.samples_per_stream(1400) == counts and sum(counts) == 1400
    assert both.tokens_per_stream(1400) == [64 * n for n in counts] and both.tokens(1400) == 64 * 1400
    assert both.epochs_per_stream(1400) == [counts[0] / len(a), counts[1] / len(b)]
    assert both.samples_per_stream(800) == [800, 0]


def test_a_stream_that_leaves_and_comes_back_goes_on(parts):
    a, b = parts["train"], parts["valid"]
    first = Mixture([a, b], [3, 1], seed=SEED)
    second = changed(first, 1100, [b], [1.0])
    third = changed(second, 1300, [b, a], [1, 2])  # listed the other way round
    read = [(third.datasets[s].path, i) for s, i in map(third.locate, range(2600))]
    for number, data in enumerate((a, b)):
        mine = [index for path, index in read if path == data.path]
        order = SampleOrder(data.shard_sizes, SEED, stream=number)
        assert mine == [order[k] for k in range(len(mine))]
    assert second.earlier_streams(1300) == {"train": 64 * first.samples_per_stream(1100)[0]}
    assert third.earlier_streams(2600) == {}
    with pytest.raises(DataError, match="sample .* of the run is of train, which data.train no longer names"):
        for g in range(100):
            second.locate(g)


def test_no_restart_and_no_split_changes_the_samples(parts):
    a, b = parts["train"], parts["valid"]
    mixture = changed(Mixture([a], seed=SEED), 24, [a, b], [1, 1])
    whole = [mixture[g].tokens.tolist() for g in range(24, 24 + 48)]
    for ranks, micro in ((1, 4), (2, 1), (3, 2)):
        again = changed(mixture, 24, [a, b], [1, 1])  # nothing read since: the same phase, not a third one
        assert len(again.phases.phases) == 2
        rows = []
        first = 24
        while len(rows) < 48:
            per_step = 12 // (ranks * micro)
            loaders = [BatchLoader(again, data_rank=r, data_size=ranks, micro_batch_size=micro, micro_batches=per_step,
                                   first_sample=first, documents="joined") for r in range(ranks)]
            steps = [next(loader) for loader in loaders]
            for m in range(per_step):
                for step in steps:
                    rows += [[*map(int, t), int(last[-1])] for t, last in zip(step[m].tokens, step[m].labels,
                                                                          strict=True)]
            first = loaders[0].state()["samples"]
            again = changed(again, first, [a, b], [1, 1])  # a restart after every step
        assert rows == whole


def test_what_reads_the_same_is_no_new_phase(parts):
    a, b = parts["train"], parts["valid"]
    mixture = Mixture([a, b], [2, 1], seed=SEED)
    assert len(changed(mixture, 500, [a, b], [4, 2]).phases.phases) == 1
    assert len(changed(mixture, 0, [b], [1.0]).phases.phases) == 1  # nothing was read of the first
    back = changed(changed(mixture, 500, [b], [1.0]), 500, [a, b], [2, 1])
    assert back.phases.to_dicts() == mixture.phases.to_dicts()
    assert len(changed(mixture, 500, [a, b], [2, 1], seed=SEED + 1).phases.phases) == 2


def test_another_seed_mixes_anew_and_repeats_nothing(parts):
    """What was read of a stream is not read again before its epoch ends, whatever the seed is changed to."""
    a, b = parts["train"], parts["valid"]
    mixture = changed(Mixture([a, b], [3, 1], seed=SEED), 700, [a, b], [3, 1], seed=SEED + 1)
    read = [mixture.locate(g) for g in range(1400)]
    for number, data in enumerate((a, b)):
        mine = [index for s, index in read if s == number]
        order = SampleOrder(data.shard_sizes, SEED, stream=number)
        assert mine == [order[k] for k in range(len(mine))]
    other = Mixture([a, b], [3, 1], seed=SEED)
    assert [s for s, _ in read[700:]] != [other.locate(g)[0] for g in range(700, 1400)]


def test_one_dataset_twice_in_a_mixture_is_two_streams(parts):
    a = parts["valid"]
    assert len(set(Mixture([a, a], [1, 1], seed=SEED).names)) == 2  # counts in logs go by name
    one = Mixture([a], seed=SEED)
    two = changed(one, 100, [a, a], [1, 1])
    streams = two.phases.phases[-1].streams
    assert [(s.number, s.first) for s in streams] == [(0, 100), (1, 0)]


@pytest.mark.parametrize("change", [
    lambda p: p.clear(), lambda p: p[0].update(first_sample=5), lambda p: p.append(p[0]),
    lambda p: p[0].pop("seed"), lambda p: p[0].update(seed=2**64),
    lambda p: p[0]["streams"][0].update(number=2**70),
    lambda p: p[0]["streams"].clear(), lambda p: p[0]["streams"][0].update(share=999),
    lambda p: p[0]["streams"][0].update(first=-1), lambda p: p[0].update(streams=7), lambda p: p.insert(0, None)])
def test_phases_that_are_none_are_named(change, parts):
    stored = Mixture([parts["valid"]], seed=SEED).phases.to_dicts()
    change(stored)
    with pytest.raises(CheckpointError, match=r"trainer\.phases"):
        Phases.from_dicts(stored)
