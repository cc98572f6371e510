"""Run under Triton's interpreter: the storages one layer really saves, beside what the plan says.

    TRITON_INTERPRET=1 python tests/plan/saved_bytes.py '{"cases": [["model.pattern=H", ...], ...], "where": {}}' ...

One layer for each list of a job's cases; a process for each job, with the variables of "where", forked from the one
that has imported everything. Prints {"measured", "planned"} in bytes of every case of every job, as JSON. Two things
are made as they are on a GPU: the experts' fused SwiGLU, and in 16 bits what flash attention keeps of an HQLT window.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import json
import multiprocessing
import os
import sys
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.attention.varlen as varlen
from interpreted import patch_language_once
from megatron.core import parallel_state
from torch import Tensor

from hola_kernels import PackedDocuments
from hola_kernels.hqlt import flash_window
from hola_megatron.config import Recipe, load_recipe
from hola_megatron.layers.costs import Share
from hola_megatron.layers.documents import Documents
from hola_megatron.model.build import build_model
from hola_megatron.parallel.groups import Layout
from hola_megatron.plan.activations import saved_by_layer
from hola_megatron.startup.start import start

TINY = Path(__file__).parent.parent.parent / "recipes" / "hola_tiny.yaml"
SMALL = ["model.layers=1", "model.hidden_size=96", "model.heads=2", "model.mlp_hidden_size=80",
         "model.attention_heads=4", "model.backend=triton", "model.layer_spec=local", "train.sequence_length=128",
         "train.micro_batch_size=2", "model.cache.block=32", "model.cache.slots=8"]


class Kept:
    """A tensor that the graph holds as long as this lives: some are let go before the layer has ended."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Flash(torch.autograd.Function):
    """What torch's attention over documents keeps; it has no CPU form."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = torch.zeros_like(v)
        ctx.save_for_backward(q, k, v, o, torch.zeros(q.shape[1], q.shape[0]))
        return o


def flash_as_on_a_gpu() -> None:
    varlen.varlen_attn = lambda q, k, v, *_, **__: Flash.apply(q, k, v)
    flash_window.flash_refusal = lambda q, v: None if q.dtype == torch.bfloat16 else "32 bits"


def main() -> None:
    patch_language_once()
    flash_as_on_a_gpu()
    context = multiprocessing.get_context("fork")
    processes, ends = [], []
    for job in map(json.loads, sys.argv[1:]):
        end, their_end = context.Pipe(duplex=False)
        processes.append(context.Process(target=run, args=(job["cases"], job["where"], their_end)))
        ends.append(end)
        processes[-1].start()
        their_end.close()
    try:
        print("RESULT " + json.dumps([end.recv() for end in ends]), flush=True)
    finally:  # EOFError above: one has failed, and said why
        for process in processes:
            process.kill()


def run(cases: list[list[str]], where: dict[str, str], end: Connection) -> None:
    os.environ.update(where)
    recipes = [load_recipe(TINY, SMALL + words) for words in cases]
    rows = []
    for recipe, before in zip(recipes, [recipes[0], *recipes], strict=False):
        if recipe.parallel != before.parallel:
            parallel_state.destroy_model_parallel()
        rows.append({"measured": measured(recipe, start(recipe)), "planned": planned(recipe)})
    end.send(rows)


def planned(recipe: Recipe) -> float:
    return sum(term.bytes for term in saved_by_layer(Share(recipe), recipe.model.layer_kinds[0]))


def measured(recipe: Recipe, layout: Layout) -> int:
    """Bytes of all distinct storages that the layer's autograd graph holds, parameters not counted."""
    chunk = build_model(recipe, device=torch.device("cpu"))[0]
    for module in chunk.modules():  # experts of another width have a configuration of their own
        if hasattr(module, "config"):
            module.config.bias_activation_fusion = True
    train, packed = recipe.train, recipe.data.documents == "separate"
    rows, length = (1, train.micro_batch_size * train.sequence_length) if packed else \
        (train.micro_batch_size, train.sequence_length)
    cuts = torch.arange(0, rows * length + 1, train.sequence_length, dtype=torch.int32)
    documents = Documents.of(PackedDocuments(cuts), layout.context_rank, layout.context) if packed else None
    pieces = layout.context * (layout.tensor if recipe.parallel.sequence else 1)
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    x = torch.randn(length // pieces, rows, recipe.model.hidden_size, dtype=dtype, requires_grad=True)
    owned = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    saved: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        y, _ = chunk.decoder.layers[0](hidden_states=x, attention_mask=None, packed_seq_params=documents)
    assert y.requires_grad
    storages = (kept.tensor.untyped_storage() for kept in saved)
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for at, size in held.items() if at not in owned)


if __name__ == "__main__":
    main()
