"""What a CUDA graph of a micro-batch needs of it, shown without one: tensors that stay, documents filled up with empty
ones, and what is refused. The graph itself: tests/gpu/test_graph_gpu.py."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import MICRO, ROOT

from hola_kernels import PackedDocuments
from hola_kernels.block_table import block_table
from hola_kernels.memo import by_shape, memoise, recording
from hola_kernels.segments import rows_as_segments
from hola_megatron.config import build_recipe, load_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.engine import cuda_graph
from hola_megatron.engine.build import build_engine
from hola_megatron.engine.cuda_graph import MicroBatchGraph, default_max_documents, fill, fixed_like
from hola_megatron.errors import RecipeError
from hola_megatron.hf.verify import _alone
from hola_megatron.recipe.checks import check_recipe
from hola_megatron.startup.start import start, stop

CPU = torch.device("cpu")
LENGTH = MICRO["train"]["sequence_length"]


def recipe_of():
    values = json.loads(json.dumps(MICRO))
    values["data"]["train"] = "unused"
    return build_recipe(values)


def batch_of(seed: int, *inner: int) -> Batch:
    """Two rows of tokens, cut at their edges and at `inner`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (2, LENGTH + 1), generator=generator)
    cuts = torch.tensor(sorted({0, LENGTH, 2 * LENGTH, *inner}), dtype=torch.int32)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(2, LENGTH), cuts)


def test_steps_on_fixed_tensors_are_the_same_steps(monkeypatch):
    """Micro-batches of differing numbers of documents, one of them with more than there is room for."""
    many = tuple(range(3, 2 * LENGTH, 3))
    steps = [[batch_of(0), batch_of(1, 5)], [batch_of(2, 7, 9), batch_of(3)], [batch_of(4, *many), batch_of(5)],
             [batch_of(6, *many), batch_of(7, 1, 2)]]
    bounded, said = [], []
    monkeypatch.setattr(cuda_graph, "PackedDocuments",
                        lambda cu_seqlens, longest: bounded.append(cu_seqlens) or PackedDocuments(cu_seqlens, longest))

    def losses(fixed: bool) -> list[list[float]]:
        recipe = recipe_of()
        engine = build_engine(recipe, start(recipe))
        if fixed:
            engine._graph = MicroBatchGraph(engine._one_micro_batch, CPU, default_max_documents(2, LENGTH), said.append)
        results = [engine.train_step(step, 1e-3) for step in steps]
        return [[result.loss, result.grad_norm, result.tokens] for result in results]

    for want, have in zip(losses(fixed=False), losses(fixed=True), strict=True):
        assert have == pytest.approx(want, rel=1e-6)
    assert len(bounded) == 6 and len({cuts.data_ptr() for cuts in bounded}) == 1  # two had no room
    assert len(said) == 1 and "a micro-batch has 44 documents, the CUDA graph at most 16" in said[0], said


def test_filled_tensors_hold_the_batch_and_empty_documents():
    batch = batch_of(0, 5)
    fixed = fixed_like(batch, 6, CPU)
    for given in (batch_of(1, 1, 2, 3), batch):  # what an earlier step left does not stay
        fill(fixed, given)
    assert all(torch.equal(a, b) for a, b in zip((fixed.tokens, fixed.labels, fixed.loss_mask),
                                                 (batch.tokens, batch.labels, batch.loss_mask), strict=True))
    end = 2 * LENGTH
    assert fixed.cu_seqlens.tolist() == [0, 5, LENGTH, end, end, end, end]
    assert fixed_like(replace(batch, documents=None), None, CPU).cu_seqlens is None


@pytest.mark.parametrize(("rows", "length", "room"), [(1, 512, 16), (1, 2048, 16), (4, 2048, 32), (16, 2048, 128),
                                                      (1, 32768, 128)])
def test_room_follows_from_the_recipe(rows, length, room):
    assert default_max_documents(rows, length) == room


def test_a_recording_holds_the_tables_it_met():
    """A graph reads their memory at every replay, whoever else has forgotten them."""
    made = by_shape(lambda size: torch.zeros(size))
    cu_seqlens = rows_as_segments(2, 64, CPU)
    with recording() as graph:
        tables = [made(3), block_table(cu_seqlens, 128, 32, equal_length=True).entries,
                  memoise(cu_seqlens, "x", lambda: torch.ones(2))]
        alive = [weakref.ref(table) for table in tables]
    del tables
    for length in range(65, 200):  # more shapes than are kept
        made(length)
        block_table(rows_as_segments(2, length, CPU), 2 * length, 32, equal_length=True)
    assert all(table() is not None for table in alive[:2])
    del graph
    assert not any(table() is not None for table in alive[:2])


def test_an_export_is_checked_without_a_graph():
    overrides = ["train.cuda_graph=true", "train.cuda_graph_documents=200"]
    assert check_recipe(_alone(load_recipe(ROOT / "recipes/hola_340m.yaml", overrides))) == []


def test_a_graph_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"train.cuda_graph: true needs .* \(this process sees no GPU\)"):
        start(load_recipe(ROOT / "recipes/hola_tiny.yaml", ["train.cuda_graph=true"]))


def test_process_groups_are_left_after_every_graph(monkeypatch):
    """NCCL waits for ever for a graph that holds its communicator."""
    order = []
    graph = MicroBatchGraph(torch.zeros_like, CPU, None)
    monkeypatch.setattr(graph, "release", lambda: order.append("graph"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: order.append("groups") and False)
    stop()
    assert order == ["graph", "groups"]
