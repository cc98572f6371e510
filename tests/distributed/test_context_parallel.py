"""Operations over context-parallel ranks against one rank: outputs, scores, cached sets, every gradient, messages.

Four gloo processes run all cases once (context_ranks.py); each test compares one case with the whole
sequence computed here. float64 within 1e-9, float32 within the contract.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))

from context_compare import check_memory, differences, joined, memory_before, one_rank
from context_ranks import CASES, PACKINGS, SHARED, gradients_with, main
from forked import run_on_ranks
from helpers import write_recipe
from inputs import make_inputs, relative_error

from hola_kernels import KernelError, PackedDocuments, hola_attention
from hola_kernels.options import CacheOptions
from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError
from hola_megatron.parallel.sequence_shard import SequenceShard

pytestmark = pytest.mark.distributed
RANKS = 4
WITH_MEMORY = [name for name, case in CASES.items() if case.what == "hola" and not case.shortcut]
EQUAL = [name for name, case in CASES.items() if not case.shortcut]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What every rank stored, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(main, RANKS, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def errors(found: list[dict], name: str) -> dict[str, float]:
    case = CASES[name]
    return differences([rank[name] for rank in found[: case.ranks]], one_rank(case), case)


@pytest.mark.parametrize("name", EQUAL)
def test_ranks_together_equal_one_rank(name, found):
    measured = errors(found, name)
    narrow = CASES[name].dtype == torch.float32
    for what, error in measured.items():
        limit = (1e-4 if what.startswith("d") else 1e-5) if narrow else 1e-9
        assert error < limit, (what, measured)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_the_memory_entering_a_rank_is_that_of_one_rank(name, found):
    """Compressed state, cached tokens with scores and positions, and the open block, at every rank's first token."""
    case = CASES[name]
    for rank in range(case.ranks):
        check_memory(found[rank][name]["memory"], memory_before(case, rank),
                     1e-9 if case.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", ["shortcut_plain", "shortcut_packed"])
def test_a_plain_sum_of_states_fails_these_tests(name, found):
    """The test of the tests: what is exact for linear attention without gate and delta rule is far off here."""
    measured = errors(found, name)
    assert measured["o"] > 1e-2 and measured["dk"] > 1e-2, measured


def test_messages_do_not_grow_with_the_sequence(found):
    names = ("traffic_240", "traffic_480", "traffic_480_packed")
    for rank in range(RANKS):
        forward, backward = ([found[rank][n][way] for n in names] for way in ("forward", "backward"))
        assert forward[0] == forward[1] == forward[2] and backward[0] == backward[1] == backward[2]
    heads, key, value, block, slots = 2, 8, 12, 16, 6
    middle = found[1]["traffic_240"]
    sizes = {(way, s.kind, s.what): s.payload for way in ("forward", "backward") for s in middle[way]}
    assert sizes == {
        ("forward", "all-gather", "state maps"): 4 * heads * key * (key + value),
        ("forward", "shift", "open block"): 4 * (block - 1) * heads * (key + value + 1),
        ("forward", "all-gather", "cache shards"): 4 * heads * slots * (key + value + 2),
        ("backward", "all-gather", "state gradients"): 4 * heads * key * value,
        ("backward", "reduce-scatter", "cache shard gradients"): 4 * RANKS * heads * slots * (key + value),
        ("backward", "shift", "open block gradients"): 4 * (block - 1) * heads * (key + value)}
    assert len(middle["forward"]) == 3 and len(middle["backward"]) == 3


@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_over_ranks_equals_each_document_alone(packing, found):
    """Forward and backward, each document computed as a sequence of its own on one rank."""
    name = f"cp4_{packing}"
    case, cuts = CASES[name], PACKINGS[packing]
    inputs = case.inputs()
    alone = [hola_attention(**{n: x if n in SHARED else x[:, a:b] for n, x in inputs.items()}, backend="torch",
                            **asdict(case.choices)) for a, b in zip(cuts[:-1], cuts[1:], strict=True) if b > a]
    o, _, gradients = joined([rank[name] for rank in found], case)
    assert relative_error(o, torch.cat(alone, 1)) < 1e-9
    for n, d in gradients_with(torch.cat(alone, 1), case.projection, inputs).items():
        assert relative_error(gradients[n], d) < 1e-9, n


def test_too_short_a_part_is_refused_by_name():
    from hola_megatron.parallel.cache_candidates import entering_memory

    x = {n: v.detach() for n, v in make_inputs(1, 14).items()}
    with pytest.raises(KernelError, match="14 tokens a context-parallel rank: a cache block of 16"):
        entering_memory(x["k"], x["v"], x["beta"], None, SequenceShard.of_rows(14, 0, 4), None, CacheOptions(16, 6))


@pytest.mark.parametrize(("changes", "problem"), [
    ({"parallel": {"context": 3}}, "rows of 128 tokens .* are not a multiple of parallel.context = 3"),
    ({"parallel": {"context": 4}, "train__sequence_length": 28}, "4 ranks get 14 tokens each .* and need 15")])
def test_cuts_that_cannot_be_are_named(changes, problem, tmp_path):
    with pytest.raises(RecipeError, match=problem):
        load_recipe(write_recipe(tmp_path / "r.yaml", tmp_path, **changes))


def test_parts_of_a_packed_row():
    documents = PackedDocuments(torch.tensor([0, 4, 13, 13, 16, 16, 18]))
    parts = [SequenceShard.of_documents(documents, rank, 3) for rank in range(3)]
    shown = [(p.documents.host().tolist(), p.before, p.first_rank, p.last_rank, p.head, p.tail) for p in parts]
    assert shown == [([0, 4, 6], 0, 0, 2, 4, 2), ([0, 6], 2, 0, 2, 6, 6), ([0, 1, 4, 6], 8, 0, 2, 1, 2)]
    assert [p.continues for p in parts] == [True, True, False] and parts[2].later.host().tolist() == [0, 3, 5]
    documents = PackedDocuments(torch.tensor([0, 6, 12, 18]))
    at_bounds = [SequenceShard.of_documents(documents, rank, 3) for rank in range(3)]
    assert all((p.before, p.first_rank, p.last_rank, p.continues) == (0, r, r, False) for r, p in enumerate(at_bounds))
