"""What a CUDA graph of a step needs of the step, shown without one: tensors that stay, documents filled up with empty
ones, and what is refused. The graph itself: tests/gpu/test_graph_gpu.py."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from helpers import MICRO, ROOT

from hola_megatron.config import build_recipe, load_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.engine.base import build_engine
from hola_megatron.engine.step_graph import StepGraph, fill, fixed_like, room_for
from hola_megatron.errors import RecipeError
from hola_megatron.parallel.groups import start, stop

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


def test_steps_on_fixed_tensors_are_the_same_steps():
    """Micro-batches of differing numbers of documents, among them more than there was room for."""
    many = tuple(range(3, 2 * LENGTH, 3))
    steps = [[batch_of(0), batch_of(1, 5)], [batch_of(2, 7, 9), batch_of(3)], [batch_of(4, *many), batch_of(5)],
             [batch_of(6), batch_of(7, 1, 2)]]

    def losses(fixed: bool) -> tuple[list[float], list[int]]:
        recipe = recipe_of()
        engine, addresses = build_engine(recipe, start(recipe)), []
        if fixed:
            passes = partial(engine._passes, forward_only=False)

            def seen(batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
                addresses.append(batches[0].tokens.data_ptr())
                return passes(batches)

            engine._graph = StepGraph(seen, CPU)
            engine._graph._warm = -100  # never captures
        return [engine.train_step(step, 1e-3).loss for step in steps], addresses

    want, _ = losses(fixed=False)
    have, addresses = losses(fixed=True)
    assert have == pytest.approx(want, rel=1e-6)
    assert addresses[0] == addresses[1] and addresses[2] == addresses[3]  # more room was made once, at the third


def test_filled_tensors_hold_the_batch_and_empty_documents():
    batch = batch_of(0, 5)
    fixed = fixed_like(batch, documents=6, device=CPU)
    for given in (batch_of(1, 1, 2, 3), batch):  # what an earlier step left does not stay
        fill(fixed, given)
    assert all(torch.equal(a, b) for a, b in zip((fixed.tokens, fixed.labels, fixed.loss_mask),
                                                 (batch.tokens, batch.labels, batch.loss_mask), strict=True))
    end = 2 * LENGTH
    assert fixed.cu_seqlens.tolist() == [0, 5, LENGTH, end, end, end, end]
    assert fixed_like(batch, None, CPU).cu_seqlens is None


@pytest.mark.parametrize(("documents", "room"), [(1, 16), (10, 16), (11, 32), (32, 48), (100, 160)])
def test_room_is_half_as_many_again(documents, room):
    assert room_for(documents) == room


def test_a_graph_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="train.cuda_graph: true needs a GPU"):
        start(load_recipe(ROOT / "recipes/hola_tiny.yaml", ["train.cuda_graph=true"]))


def test_process_groups_are_left_after_every_graph(monkeypatch):
    """NCCL waits for ever for a graph that holds its communicator."""
    order = []
    graph = StepGraph(lambda batches: [], CPU)
    monkeypatch.setattr(graph, "release", lambda: order.append("graph"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: order.append("groups") and False)
    stop()
    assert order == ["graph", "groups"]
