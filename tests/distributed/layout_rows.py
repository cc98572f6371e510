"""The table of layouts, and one rank's program that trains its rows.

A row is a short run of the whole training program in some layout: validation, a sample text and a checkpoint
included. It is compared with a run of the same recipe on one process, its reference. All rows of one number of ranks
run one after the other in the same processes, which have started and warmed up once.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.forked import log_of, run_on_ranks
from helpers import LONG, write_recipe
from torch import Tensor

from hola_megatron.config import Recipe, load_recipe
from hola_megatron.engine.base import Engine
from hola_megatron.engine.build import build_engine
from hola_megatron.model.parameters import ParamShard
from hola_megatron.profile.profiler import _synthetic
from hola_megatron.startup.start import start

STEPS = 2  # gradients, what an update makes of them, and what the moments of the optimizer add to the next
LAST = f"checkpoints/step_{STEPS:08d}"
MOE = {"experts": 4, "top_k": 2, "hidden_size": 32}
PROMPT = list(range(10, 60))

TP, SP, PP, CP, DP = {"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}, {}
PLAIN = {"distributed_optimizer": False}
RECOMPUTE = {"train__recompute": "full"}
PIECES = {"train__logits_budget_gb": 1e-5}  # logits of 9 tokens of 128, or of 18 on two tensor ranks
# every kind of attention layer, with grouped queries and norms of queries and keys; the hola layers have windows too
WINDOWS = {"model__pattern": "HWHA", "model__attention_window": 18, "model__attention_heads": 4,
           "model__attention_kv_heads": 2, "model__attention_qk_norm": True,
           "model__cache": {"block": 16, "slots": 4, "local": "window", "window": 5, "merge": "convex",
                            "rope_theta": 300.0}}
# a state that is read late, in hola and gdn layers
LATE = {"model__pattern": "HG", "model__state_delay": 9,
        "model__cache": {"block": 16, "slots": 4, "local": "window", "window": 9}}
# hola layers without a state
STATELESS = {"model__pattern": "HA", "model__rule": "none", "model__cache": {
    "block": 16, "slots": 4, "score": "learned", "router_width": 4, "local": "window", "window": 9,
    "rope_theta": 300.0}}
# documents go on over the cut of two context ranks: in a row of two samples the second sample begins there
ONE_SAMPLE = {"train__micro_batch_size": 1}
ZERO1, ZERO2 = ({"engine": "deepspeed", "parallel": {"zero_stage": stage}} for stage in (1, 2))


@dataclass(frozen=True)
class Row:
    """A layout and what else differs from its reference's recipe.

    reference: a key of REFERENCES. gradients: every parameter's gradient is looked at too. long: only with --long, as
    all rows of four ranks; what it would find, shorter rows find too.
    """

    ranks: int
    parallel: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    reference: str = "adamw"
    gradients: bool = False
    long: bool = False

    @property
    def chosen(self) -> bool:
        return LONG or not self.only_long

    @property
    def only_long(self) -> bool:
        return self.long or self.ranks > 2

    def recipe(self) -> dict[str, Any]:
        """Changes of the micro recipe."""
        changes = {**REFERENCES[self.reference], **self.changes}
        return {**changes, "parallel": {**self.changes.get("parallel", {}), **self.parallel}}


# on one process; the others are compared with these. Untied: the output has weights of its own
REFERENCES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "one_sample": ONE_SAMPLE,
    "joined": {"data__documents": "joined"},
    "untied": {"model__tie_embeddings": False},
    "experts": {"model__moe": MOE},
    "muon": {"train__optimizer": "muon"},
    "windows": {**WINDOWS, **ONE_SAMPLE},
    "deltaproduct": {"model__pattern": "deltaproduct", "model__beta_range": 2},
    "routed": {"model__pattern": "H", **ONE_SAMPLE, "model__cache": {
        "block": 16, "slots": 4, "score": "learned", "router_width": 4, "merge": "two"}},
    "late": LATE,
    "stateless": STATELESS,
    "muon_windows": {"train__optimizer": "muon", **WINDOWS},
    "bf16": {"train__precision": "bf16", "train__steps": 6},
}
ROWS: dict[str, Row] = {
    "recompute": Row(1, PLAIN, RECOMPUTE),
    "pieces": Row(1, PLAIN, PIECES, long=True),
    "tp2": Row(2, TP, gradients=True),
    "tp2_plain_optimizer": Row(2, {**TP, **PLAIN, "overlap": False}, gradients=True, long=True),
    "tp2_sp": Row(2, SP, gradients=True),
    "pp2": Row(2, PP, gradients=True),
    "pp2_vpp2": Row(2, {**PP, "virtual_pipeline": 2}),
    "cp2": Row(2, {**CP, **PLAIN}, reference="one_sample", gradients=True),
    "dp2": Row(2, {**PLAIN, "overlap": False}),
    "dp2_dist_opt": Row(2, {"overlap": False}, long=True),
    "dp2_dist_opt_overlap": Row(2, DP),
    "pieces_cp2": Row(2, CP, PIECES, "one_sample"),
    "joined_pp2": Row(2, PP, reference="joined"),
    "joined_cp2_recompute": Row(2, CP, RECOMPUTE, "joined"),
    "untied_pieces_tp2": Row(2, TP, PIECES, "untied"),
    "experts_ep2": Row(2, {"expert": 2}, reference="experts"),
    "experts_ep2_plain_optimizer": Row(2, {"expert": 2, **PLAIN, "overlap": False}, reference="experts"),
    "experts_dp2": Row(2, {"expert": 1}, reference="experts"),
    "experts_ep2_of_tensor_ranks": Row(2, {**SP, "expert": 2}, reference="experts", gradients=True),
    # both at once: what pieces do wrong shows in the same numbers
    "muon_pieces_tp2": Row(2, {**TP, **PLAIN}, PIECES, "muon"),
    "muon_pieces_tp2_sp": Row(2, {**SP, **PLAIN}, PIECES, "muon"),
    "muon_pieces_pp2": Row(2, {**PP, **PLAIN}, PIECES, "muon"),
    "muon_pieces_dp2": Row(2, {**DP, **PLAIN}, PIECES, "muon"),
    "windows_tp2": Row(2, TP, reference="windows", gradients=True),
    "windows_tp2_sp": Row(2, SP, reference="windows", gradients=True),
    "windows_pp2": Row(2, PP, reference="windows"),
    "windows_cp2": Row(2, {**CP, **PLAIN}, reference="windows", gradients=True),
    "deltaproduct_tp2": Row(2, TP, reference="deltaproduct"),
    "deltaproduct_pp2": Row(2, PP, reference="deltaproduct", long=True),
    "late_tp2_sp": Row(2, SP, reference="late", gradients=True),
    "late_pp2": Row(2, PP, reference="late"),
    "stateless_tp2_sp": Row(2, SP, reference="stateless", gradients=True),
    "stateless_pp2": Row(2, PP, reference="stateless"),
    "routed_tp2_sp": Row(2, SP, reference="routed", gradients=True),
    "routed_cp2": Row(2, {**CP, **PLAIN}, reference="routed", gradients=True),
    "muon_windows_tp2": Row(2, {**TP, **PLAIN}, reference="muon_windows"),
    "deepspeed_dp2_zero1": Row(2, {"overlap": False}, {**ZERO1, **RECOMPUTE}, long=True),
    "deepspeed_dp2_zero2": Row(2, DP, ZERO2),
    "deepspeed_tp2": Row(2, TP, ZERO1, gradients=True, long=True),
    "deepspeed_tp2_sp": Row(2, SP, ZERO1, gradients=True),
    "deepspeed_cp2_zero2": Row(2, CP, ZERO2, "one_sample"),
    "bf16_tp2_sp_recompute": Row(2, SP, RECOMPUTE, "bf16"),
    "bf16_cp2_recompute": Row(2, CP, {**RECOMPUTE, **ONE_SAMPLE}, "bf16"),
    "deepspeed_bf16_dp2_zero2": Row(2, DP, ZERO2, "bf16", long=True),
    "tp2_pp2": Row(4, {**TP, **PP}, gradients=True),
    "tp2_sp_dp2_overlap": Row(4, SP),
    "cp2_tp2_sp": Row(4, {**CP, **SP, **PLAIN}, reference="one_sample", gradients=True),
    "cp2_pp2": Row(4, {**CP, **PP, **PLAIN}, reference="one_sample", gradients=True),
    "cp2_dp2": Row(4, CP, reference="one_sample"),
    "cp4_recompute": Row(4, {"context": 4}, RECOMPUTE, "one_sample"),
    "joined_cp2_dp2": Row(4, CP, reference="joined"),
    "bf16_cp2_pp2_recompute": Row(4, {**CP, **PP}, {**RECOMPUTE, **ONE_SAMPLE}, "bf16"),
    "deepspeed_tp2_sp_dp2_zero2": Row(4, SP, ZERO2),
}


# A row leaves its process groups behind, as Megatron only forgets them, and each of them has three threads that poll:
# after 38 rows 2,400 of them kept both cores busy.
ROWS_OF_A_PROCESS = 8


def run_rows(rows: dict[str, Row], folder: Path, data: Path, before: Callable[[], None] | None = None,
             **common: Any) -> None:
    """Train all rows, in so many processes as each needs; folder/NAME is then the run of row NAME.

    data: the folder of train/ and valid/. before: called in every process first. common: changes of every row's recipe.
    A row that fails ends its processes, and the rows after it there have no runs: `finished` says so.
    """
    groups = {ranks: [(name, row) for name, row in rows.items() if row.ranks == ranks]
              for ranks in sorted({row.ranks for row in rows.values()})}

    def run_group(ranks: int) -> None:
        for some in batched(groups[ranks], ROWS_OF_A_PROCESS):
            try:
                run_on_ranks(main, ranks, folder, dict(some), data, before, common, timeout=600)
            except AssertionError as error:
                print(error)

    with ThreadPoolExecutor(max(len(groups), 1)) as pool:
        list(pool.map(run_group, groups))


def wanted(request: pytest.FixtureRequest, every: tuple[str, ...]) -> set[str]:
    """The rows that this module's chosen tests have as their parameter `name`; all of `every` for one without it."""
    items = [item for item in request.session.items if item.path == request.path]
    found = [[item.callspec.params["name"]] if "name" in getattr(getattr(item, "callspec", None), "params", {})
             else every for item in items if "runs" in item.fixturenames]
    return {name for names in found for name in names}


def finished(folder: Path, name: str, row: Row) -> Path:
    """The run of a row; AssertionError with what its first rank printed if it did not end."""
    if f"row {name} has ended\n" not in (text := log_of(folder, row.ranks, 0).read_text(errors="replace")):
        raise AssertionError(f"{name} did not end: {text.rpartition('row ')[2][-4000:]}")
    return folder / name


def said(folder: Path, name: str, row: Row) -> str:
    """What the first rank printed during a row."""
    text = log_of(folder, row.ranks, 0).read_text(errors="replace")
    return text.partition(f"row {name} begins\n")[2].partition(f"row {name} has ended\n")[0]


def main(rank: int, ranks: int, folder: Path, rows: dict[str, Row], data: Path,
         before: Callable[[], None] | None, common: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    from hola_megatron.parallel.cpu import adapt_to_cpu
    from hola_megatron.train.loop import train

    if before:
        before()
    adapt_to_cpu()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    for name, row in rows.items():
        print(f"row {name} begins", flush=True)
        changes = {"run_dir": str(folder / name), "train__steps": STEPS, **common, **row.recipe()}
        recipe = load_recipe(write_recipe(folder / f"{name}.{rank}.yaml", data / "train", **changes))
        probed = probe(recipe, ranks) if row.gradients else None
        train(recipe)
        parallel_state.destroy_model_parallel()
        if probed:
            torch.save(probed, folder / f"{name}.{rank}.pt")
        print(f"row {name} has ended", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def probe(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """One step's gradients of this rank, what each parameter alone adds to the clipping norm, logits after a prompt.

    Weights stay as they were initialised. Not for data ranks, which need samples of their own, nor for context ranks
    with a distributed optimizer, which hold parts of reduced gradients.
    """
    from hola_megatron.engine.sampling import next_logits
    from hola_megatron.engine.scoring import shared_scores

    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, global_batch_size=4))
    layout = start(recipe)
    engine = build_engine(recipe, layout)
    logits = next_logits(engine, torch.tensor(PROMPT)).clone()
    scores = shared_scores(engine, [(PROMPT, 40), (PROMPT[:9], 2), (PROMPT[:30], 3)])
    engine.train_step(_synthetic(recipe, layout), 0.0, judge=lambda loss, norm: "only gradients are wanted")
    shards = engine.param_shards()
    held = [shard.of(gradients(engine)[shard.parameter]).float().clone() for shard in shards]
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, [shard.name for shard in shards])
    norms = {name: norm_of_one(engine, name, shards, held) for name in sorted({x for names in everyone for x in names})}
    about = [(shard.name, shard.shape, shard.axis, shard.offset) for shard in shards]
    return {"about": about, "held": held, "norms": norms, "logits": logits, "scores": scores}


def gradients(engine: Engine) -> dict[Any, Tensor]:
    """{parameter: the tensor that holds its reduced gradient}."""
    if engine.recipe.engine == "deepspeed":
        zero = engine.optimizer
        return {parameter: owned.of(zero.flat).view(parameter.shape) for parameter, owned in zero.ranges.items()}
    return {parameter: parameter.main_grad for chunk in engine.model for parameter in chunk.parameters()}


def norm_of_one(engine: Engine, name: str, shards: list[ParamShard], held: list[Tensor]) -> float:
    """The norm that clips if no other parameter had a gradient."""
    where = gradients(engine)
    for tensor in where.values():
        tensor.zero_()
    for shard, gradient in zip(shards, held, strict=True):
        if shard.name == name:
            shard.of(where[shard.parameter]).copy_(gradient)
    if engine.recipe.engine != "deepspeed":
        engine.optimizer.prepare_grads()
    return float(engine.optimizer.get_grad_norm())


@dataclass(frozen=True)
class Probed:
    """What `probe` found, of all ranks."""

    gradients: dict[str, Tensor]
    norms: dict[str, float]
    logits: Tensor
    scores: list[tuple[float, bool]]


def probed(folder: Path, name: str, ranks: int) -> Probed:
    """Whole gradients; asserts that ranks which hold the same slice, or know the same number, agree."""
    saved = [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(ranks)]
    whole: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for rank in saved:
        for (parameter, shape, axis, offset), gradient in zip(rank["about"], rank["held"], strict=True):
            target = whole.setdefault(parameter, torch.zeros(shape)).narrow(axis, offset, gradient.shape[axis])
            seen = filled.setdefault(parameter, torch.zeros(shape, dtype=torch.bool)).narrow(
                axis, offset, gradient.shape[axis])
            if seen.all():
                assert (target - gradient).norm() <= 1e-6 * gradient.norm(), f"{parameter} differs between ranks"
            target.copy_(gradient)
            seen.fill_(True)
    assert all(seen.all() for seen in filled.values())
    for rank in saved:
        norms = {name: abs(norm - saved[0]["norms"][name]) for name, norm in rank["norms"].items()}
        assert all(off <= 1e-6 * saved[0]["norms"][name] for name, off in norms.items()), norms
        assert torch.allclose(rank["logits"], saved[0]["logits"], atol=1e-6)
        assert rank["scores"] == saved[0]["scores"]
    return Probed(whole, saved[0]["norms"], saved[0]["logits"], saved[0]["scores"])
