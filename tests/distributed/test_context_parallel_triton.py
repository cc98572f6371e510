"""The fused layer over ranks, its Triton kernels interpreted, against the torch backend on one rank, on gloo."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))

from context_compare import differences, one_rank
from context_ranks import PACKINGS, Case, run_case
from forked import run_on_ranks
from helpers import LONG
from interpreted import only_interpreted, patch_language_once

only_interpreted()

pytestmark = pytest.mark.distributed
RANKS = 4
NARROW = {"dtype": torch.float32, "key": 64, "value": 64, "backend": "triton"}
# parts of 60 and 24 tokens cut blocks of 16, parts of 32 do not; parts of 72 hold two spans of a chunk
CASES = {
    "empty_and_single": Case(RANKS, 240, PACKINGS["empty_and_single"], **NARROW),
    "whole_blocks": Case(RANKS, 128, options={"score": "recency"}, **NARROW),
    "rows": Case(RANKS, 96, rows=2, **NARROW),
    "spans": Case(RANKS, 288, (0, 20, 200, 205, 288), **NARROW),
    # in 16 bits the state pass saves both chunks' states; cached tokens are chosen by exact scores, far apart
    "half": Case(RANKS, 264, (0, 20, 200, 205, 264), options={"score": "betav"}, spread=1.5,
                 **NARROW | {"dtype": torch.float16}),
}
if not LONG:
    CASES = {name: CASES[name] for name in ("empty_and_single", "spans", "half")}
# of o and scores, of gradients
LIMITS = {torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 5e-3)}


def main(rank: int, ranks: int, folder: Path) -> None:
    from hola_kernels.exact_cache import triton_split_read
    from hola_kernels.gated_delta import triton_rule

    patch_language_once()
    triton_split_read.ALIGNED = 1  # so that few blocks are read in as many runs as many are
    dist.init_process_group("gloo")
    results = {}
    for name, case in CASES.items():
        whole = triton_rule.span_chunks
        triton_rule.span_chunks = (lambda *_: 1) if name == "spans" else whole
        results[name] = run_case(case, rank, dist.group.WORLD)
        triton_rule.span_chunks = whole
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(main, RANKS, folder, timeout=500, preload="context_ranks")  # these need neither Megatron nor data
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_equal_one_rank(name, found):
    case = replace(CASES[name], backend="torch")
    measured = differences([rank[name] for rank in found], one_rank(case), case)
    for what, error in measured.items():
        assert error < LIMITS[case.dtype][what.startswith("d")], (what, measured)
    messages = [[sent.what for sent in found[1][name][way]] for way in ("forward", "backward")]
    assert messages == [["state maps", "open block", "cache shards"],
                        ["state gradients", "cache shard gradients", "open block gradients"]]
