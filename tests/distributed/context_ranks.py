"""One rank of the operation-level tests of context parallelism: `main` runs every case and stores what it got.

The cases and their inputs are made here for both sides, so the tests compare the same numbers computed on one rank.
"""

from __future__ import annotations

import datetime
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))

from inputs import make_inputs

from hola_kernels import PackedDocuments
from hola_kernels.options import CacheOptions
from hola_megatron.parallel import context
from hola_megatron.parallel.collectives import counted
from hola_megatron.parallel.sequence_shard import SequenceShard

SHARED = ("gamma_q", "gamma_k", "gate", "sink", "weight")


@dataclass(frozen=True)
class Case:
    """What is computed, on how many ranks."""

    ranks: int
    length: int
    cuts: tuple[int, ...] | None = None
    rows: int = 1
    what: str = "hola"
    decay: str = "slow"
    dtype: torch.dtype = torch.float64
    shortcut: bool = False
    backend: str = "torch"
    key: int = 8
    value: int = 12
    gate: float | None = None  # all heads' gate before its sigmoid; None: random
    spread: float = 0.0  # of the logarithm of v's lengths: the wider, the further apart the scores
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.cuts is None else torch.tensor(self.cuts, dtype=torch.int32)

    @property
    def choices(self) -> CacheOptions:
        return CacheOptions(**{"block": 16, "slots": 6, **self.options})

    @property
    def projection(self) -> Tensor:
        """What the output is multiplied with before it is summed and differentiated."""
        value = {"conv": (2 * self.key,), "attention": (2, self.key)}.get(self.what, (2, self.value))
        return torch.randn(self.rows, self.length, *value, generator=torch.Generator().manual_seed(1),
                           dtype=torch.float64).to(self.device)

    def inputs(self) -> dict[str, Tensor]:
        value = self.key if self.what == "attention" else self.value
        made = make_inputs(self.rows, self.length, key=self.key, value=value, decay=self.decay)
        loud = torch.randn(self.rows, self.length, 2, 1, generator=torch.Generator().manual_seed(7))
        made["v"] = made["v"] * (self.spread * loud.double()).exp()
        if self.gate is not None:
            made["gate"] = torch.full_like(made["gate"], self.gate)
        made = {name: self.placed(name, x) for name, x in made.items()}
        if self.what == "conv":
            x = made["q"].detach().flatten(2).requires_grad_()
            weight = torch.randn(x.shape[-1], 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            return {"x": x, "weight": weight.to(x).requires_grad_()}
        kept = {"gdn": ("q", "k", "v", "log_decay", "beta"), "attention": ("q", "k", "v")}.get(self.what, tuple(made))
        return {name: made[name] for name in kept}

    def placed(self, name: str, x: Tensor) -> Tensor:
        """An input where and as the case wants it; decays and the cache's parameters are float32 at least."""
        narrow = name in ("q", "k", "v")
        dtype = self.dtype if narrow else torch.promote_types(self.dtype, torch.float32)
        return x.detach().to(self.device, dtype).requires_grad_()

    def part(self, rank: int) -> SequenceShard:
        if self.cuts is None:
            return SequenceShard.of_rows(self.length // self.ranks, rank, self.ranks)
        return SequenceShard.of_documents(PackedDocuments(self.cu_seqlens), rank, self.ranks)


# 240 tokens: parts of 120 on two ranks and of 60 on four, both cut blocks of 16
PACKINGS = {
    "across": (0, 50, 130, 240),  # a document over two and over three ranks, others inside one
    "bounds": (0, 60, 120, 121, 180, 240),  # documents that begin and end where ranks do
    "long_after_short": (0, 1, 2, 240),
    "empty_and_single": (0, 0, 59, 60, 60, 61, 119, 120, 120, 121, 121, 200, 200, 239, 240, 240),
    "whole": (0, 240),
}
CASES: dict[str, Case] = {}
for ranks in (2, 4):
    CASES[f"cp{ranks}_plain"] = Case(ranks, 240)
    CASES[f"cp{ranks}_rows"] = Case(ranks, 160, rows=2)
    for name, cuts in PACKINGS.items():
        CASES[f"cp{ranks}_{name}"] = Case(ranks, 240, cuts)
CASES |= {
    "cp4_fast": Case(4, 240, PACKINGS["across"], decay="fast"),
    "cp4_no_decay": Case(4, 240, decay="none"),
    "cp4_fp32": Case(4, 240, PACKINGS["across"], dtype=torch.float32),
    "cp2_fp32": Case(2, 240, dtype=torch.float32),
    "cp4_shortest_parts": Case(4, 60),  # 15 tokens a rank: one less than a block
    "cp4_many_slots": Case(4, 240, options={"slots": 100}),
    "cp4_block_1": Case(4, 80, (0, 30, 80), options={"block": 1, "slots": 3}),
    "cp4_flat": Case(4, 240, PACKINGS["across"], options={"read_norm": "l2", "score": "e"}),
    "cp2_window": Case(2, 240, PACKINGS["across"], options={"local": "window", "window": 20}),
    "cp4_window": Case(4, 240, PACKINGS["bounds"], options={"local": "window", "window": 17}),
    "cp4_window_in_a_block": Case(4, 240, PACKINGS["empty_and_single"], options={"local": "window", "window": 9}),
    "cp4_positions": Case(4, 240, PACKINGS["across"], options={"rope_theta": 300.0, "local": "window", "window": 17}),
    "cp2_positions": Case(2, 160, rows=2, options={"rope_theta": 300.0}),
    "cp2_window_alone": Case(2, 160, rows=2, options={"local": "window", "window": 40, "slots": 0}),
    "cp4_block_alone": Case(4, 240, PACKINGS["across"], options={"slots": 0}),
    "cp4_itself": Case(4, 240, PACKINGS["across"], options={"local": "none", "read_norm": "none"}),
    "cp4_recency": Case(4, 240, PACKINGS["across"], options={"score": "recency"}),
    "cp4_cosine": Case(4, 240, PACKINGS["across"], options={"score": "cosine"}),
    "cp2_cosine_rows": Case(2, 160, rows=2, options={"score": "cosine"}),
    "cp4_random": Case(4, 240, PACKINGS["across"], options={"score": "random"}),
    "cp4_reference": Case(4, 80, (0, 30, 79, 80), backend="reference"),
    "cp4_gdn": Case(4, 240, PACKINGS["across"], what="gdn"),
    "cp2_gdn_plain": Case(2, 160, rows=2, what="gdn"),
    "cp4_conv": Case(4, 40, (0, 9, 11, 29, 30, 31, 40), what="conv"),
    "cp4_conv_rows": Case(4, 12, rows=2, what="conv"),
    "cp4_attention": Case(4, 240, PACKINGS["across"], what="attention"),
    "cp4_attention_singles": Case(4, 240, PACKINGS["empty_and_single"], what="attention"),
    "cp2_attention_rows": Case(2, 80, rows=2, what="attention"),
    **{f"cp4_window_{name}_{window}": Case(4, 240, cuts, what="attention", options={"window": window})
       for name, cuts in PACKINGS.items() for window in (2, 20, 61)},
    "cp2_window_rows": Case(2, 80, rows=2, what="attention", options={"window": 41}),
    "shortcut_plain": Case(4, 240, shortcut=True),
    "shortcut_packed": Case(4, 240, PACKINGS["long_after_short"], shortcut=True),
    "traffic_240": Case(4, 240, dtype=torch.float32),
    "traffic_480": Case(4, 480, dtype=torch.float32),
    "traffic_480_packed": Case(4, 480, (0, 100, 101, 400, 480), dtype=torch.float32),
}


def run_case(case: Case, rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """Outputs, memory, gradients and messages of this rank."""
    part = case.part(rank)
    cp = context.ContextParallel(part, group)
    whole = case.inputs()
    local = {n: x.detach() if n in SHARED else part.slice(x.detach()) for n, x in whole.items()}
    local = {n: x.clone().requires_grad_() for n, x in local.items()}
    found: dict[str, Any] = {}
    with counted() as forward, plain_sum(case.shortcut):
        if case.what == "conv":
            o = context.short_conv_over_ranks(**local, cp=cp, backend=case.backend)
        elif case.what == "attention":
            o = context.attention_over_ranks(**local, cp=cp, **case.options)
        elif case.what == "gdn":
            o, found["score"] = context.gated_delta_over_ranks(**local, cp=cp, backend=case.backend)
        else:
            o = context.hola_attention_over_ranks(**local, cp=cp, backend=case.backend, options=case.choices)
    with counted() as backward:
        found["gradients"] = gradients_with(o, part.slice(case.projection).to(o), local)
    if case.what == "hola" and not case.shortcut:
        tokens = {n: local[n] for n in ("q", "k", "v", "log_decay", "beta")}
        read = context.tokens_at_positions(*(local[n] for n in ("q", "k", "gamma_q", "gamma_k")), case.choices, cp)
        found["score"], found["memory"] = context.scores_and_memory(
            **tokens, read_k=read["k"], cp=cp, backend=case.backend, options=case.choices)
    return {"o": o.detach(), "forward": forward, "backward": backward, **found}


def gradients_with(o: Tensor, weight: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad((o * weight).sum(), list(inputs.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if d is None else d for (n, x), d in zip(inputs.items(), found, strict=True)}


@contextmanager
def plain_sum(on: bool):
    """LASP-2's shortcut for ungated linear attention: add the ranks' states instead of folding their maps."""
    exact = context.fold_left

    def shortcut(maps: Tensor, part: SequenceShard) -> Tensor:
        earlier = maps[part.first_rank: part.rank] if part.before else maps[:0]
        return earlier[..., : -maps.shape[-2]].sum(0)

    context.fold_left = shortcut if on else exact
    yield
    context.fold_left = exact


def main(rank: int, ranks: int, folder: Path) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    groups = {2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    results = {}
    for name, case in CASES.items():
        if rank < case.ranks:
            results[name] = run_case(case, rank, groups[case.ranks])
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()

