"""Resume: bit for bit in the same layout, and into any other layout, optimizer or engine, its state included."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from distributed.layout_rows import (
    CP,
    DP,
    LATE,
    MOE,
    PLAIN,
    PP,
    STATELESS,
    TP,
    WINDOWS,
    ZERO1,
    ZERO2,
    Row,
    finished,
    run_rows,
    said,
    wanted,
)
from helpers import LONG, checkpoint_tensors, metric_rows, run_ranks, write_recipe
from train.faults import install_named
from train.quick_launch import QuickLauncher

from hola_megatron.config import load_recipe
from hola_megatron.train.loop import train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]  # all rows run in one fixture

KINDS = ("weight", "exp_avg", "exp_avg_sq")
STEPS, MIDDLE, LAST = 4, "checkpoints/step_00000002", "checkpoints/step_00000004"
BF16 = {"train__precision": "bf16"}
MUON = {"train__optimizer": "muon"}
# the router's bias balances without a loss: it is state, and no parameter
BY_BIAS = {"model__moe": {**MOE, "balancing": "bias", "bias_rate": 0.01}}
DIST_OPT = {"distributed_optimizer": True}
# four steps without a stop, with checkpoints at 2 and 4
WHOLE: dict[str, Row] = {
    "one": Row(1, PLAIN),
    "tp2": Row(2, TP),
    "dist_opt": Row(2, DIST_OPT),
    "bf16_one": Row(1, PLAIN, BF16),
    "bf16_one_dist_opt": Row(1, DIST_OPT, BF16),
    "bf16_dist_opt": Row(2, DIST_OPT, BF16),
    "windows_tp2": Row(2, TP, WINDOWS),
    "late_tp2": Row(2, TP, LATE),
    "stateless_tp2": Row(2, TP, STATELESS),
    "muon_tp2": Row(2, {**TP, **PLAIN}, MUON),
    "muon_bf16_tp2": Row(2, {**TP, **PLAIN}, {**MUON, **BF16}),
    "experts_one": Row(1, {}, BY_BIAS),
    "experts_ep2": Row(2, {"expert": 2}, BY_BIAS),
    "deepspeed_zero2": Row(2, DP, ZERO2),
    "deepspeed_bf16_zero1": Row(2, DP, {**ZERO1, **BF16}),
    "deepspeed_bf16_zero2": Row(2, DP, {**ZERO2, **BF16}),
}
MANY = ("deepspeed_bf16_zero1",)  # with --long


@dataclass(frozen=True)
class Continued:
    """A copy of a whole run as a kill after its second step leaves it, continued in `row`; exact: to the same bits."""

    source: str
    row: Row
    exact: bool = False


CONTINUED = {f"{name}_again": Continued(name, row, exact=True) for name, row in WHOLE.items()
             if name not in ("one", "muon_tp2")} | {
    "tp2_in_tp1": Continued("tp2", Row(1, {})),
    "tp2_in_pp2": Continued("tp2", Row(2, PP)),
    "tp2_in_dp2": Continued("tp2", Row(2, PLAIN)),
    "tp2_in_dp2_dist_opt": Continued("tp2", Row(2, DIST_OPT)),
    "tp2_in_cp2": Continued("tp2", Row(2, CP)),
    "muon_tp2_alone": Continued("muon_tp2", Row(1, PLAIN, MUON)),
    "experts_ep2_alone": Continued("experts_ep2", Row(1, {}, BY_BIAS)),
    "deepspeed_in_megatron_tp2": Continued("deepspeed_zero2", Row(2, TP)),
    "megatron_in_deepspeed_dp2": Continued("one", Row(2, DP, ZERO1)),
}
MISSING = {kind for kind, package in (("deepspeed", "deepspeed"), ("muon", "emerging_optimizers"))
           if importlib.util.find_spec(package) is None}


def possible(name: str) -> bool:
    return not any(kind in name for kind in MISSING) and (LONG or not name.startswith(MANY))


def copied(whole: Path, to: Path) -> None:
    copytree(whole, to)
    rmtree(to / LAST)


@pytest.fixture(scope="module")
def runs(text_data, tmp_path_factory, request) -> Path:
    """The folder of the runs that the chosen tests look at; the whole ones are in whole/."""
    folder = tmp_path_factory.mktemp("resume")
    names = wanted(request, (*WHOLE, *CONTINUED))
    (folder / "whole").mkdir()
    how = {"train__steps": STEPS, "checkpoint": {"every": 2, "keep": 5}}
    again = {name: continued for name, continued in CONTINUED.items() if name in names and possible(name)}
    sources = names | {continued.source for continued in again.values()}
    run_rows({name: row for name, row in WHOLE.items() if name in sources and possible(name)}, folder / "whole",
             text_data, **how)
    for name, continued in again.items():
        copied(finished(folder / "whole", continued.source, WHOLE[continued.source]), folder / name)
    run_rows({name: continued.row for name, continued in again.items()}, folder, text_data, **how)
    return folder


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] if name.startswith(MANY) else [])
                                  for name in CONTINUED])
def test_a_run_goes_on(name, runs):
    if not possible(name):
        pytest.skip("its package is not installed")
    continued = CONTINUED[name]
    run, whole = finished(runs, name, continued.row), runs / "whole" / continued.source
    assert "resuming at step 2" in said(runs, name, continued.row)
    rows = metric_rows(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for want, have in zip(metric_rows(whole), rows, strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5), (have, want)
        assert have["samples"] == want["samples"]
    for kind in (*KINDS, *(["router"] if name.startswith("experts") else [])):
        want, have = (checkpoint_tensors(path / LAST, kind) for path in (whole, run))
        assert want.keys() == have.keys() and want
        for tensor, x in want.items():
            if continued.exact:
                assert torch.equal(have[tensor], x), (kind, tensor)
            assert (have[tensor] - x).norm() <= 1e-3 * x.norm().clamp_min(1e-6), (kind, tensor)


@pytest.mark.parametrize("name", ["bf16_one", "bf16_one_dist_opt", "bf16_dist_opt"])
def test_checkpoints_of_bf16_hold_each_parameters_own_state(name, runs):
    """The decay and the gates of a bf16 model are float32."""
    held = {kind: checkpoint_tensors(runs / "whole" / name / LAST, kind) for kind in ("weight", "exp_avg_sq")}
    assert all(x.abs().max() > 0 for kind in held.values() for name, x in kind.items() if not name.endswith("sink"))
    # decay starts between log 1e-4 and log 16 and hardly moves: another parameter's values would show
    decay = torch.cat([x for name, x in held["weight"].items() if name.endswith("A_log")])
    norms = torch.cat([x for name, x in held["weight"].items() if name.endswith("norm.weight")])
    assert decay.min() > -9.3 and decay.max() < 2.8 and decay.std() > 0.1 and (norms - 1).abs().max() < 0.1


def test_checkpoints_hold_float32_weights_momentum_of_matrices_and_the_bias_of_routers(runs):
    for name in ("bf16_one", "deepspeed_bf16_zero2"):
        if possible(name):
            weights = checkpoint_tensors(runs / "whole" / name / LAST)["model.layers.0.mlp.gate_proj.weight"]
            assert not torch.equal(weights, weights.bfloat16().float())
    bias = checkpoint_tensors(runs / "whole/experts_ep2" / LAST, "router")["model.layers.0.mlp.router.expert_bias"]
    assert bias.shape == (4,) and bias.abs().max() > 0.005
    if possible("muon"):
        weight, first, second = (checkpoint_tensors(runs / "whole/muon_tp2" / LAST, kind) for kind in KINDS)
        assert first.keys() == weight.keys() > second.keys()
        assert "model.layers.0.mixer.q_proj.weight" not in second


@pytest.mark.parametrize("numbers", [(3, 1), pytest.param((4, 2, 3, 1), marks=pytest.mark.long)], ids=str)
def test_the_number_of_processes_may_change_at_every_restart(numbers, text_data, tmp_path):
    """Two steps on each number of processes: the samples and losses of a run on one."""
    steps = 2 * len(numbers)
    folders = [tmp_path / "whole", tmp_path / "parts"]
    recipes = []
    for folder in folders:
        folder.mkdir()
        recipes.append(write_recipe(
            folder / "recipe.yaml", text_data / "train", run_dir=str(folder / "run"), train__steps=steps,
            model__layers=2, model__pattern="HA", train__global_batch_size=12, train__micro_batch_size=1,
            checkpoint={"every": 2, "keep": 9}))
    train(load_recipe(recipes[0]))
    for last, ranks in zip(range(2, steps + 1, 2), numbers, strict=True):
        done = run_ranks([str(recipes[1])], folders[1] / "log.txt", ranks=ranks,
                         before=partial(install_named, "interrupt@2@0") if last < steps else None)
        assert done.code == (75 if last < steps else 0), done.output[-3000:]
        assert last == 2 or f"resuming at step {last - 2}" in done.output, done.output[-3000:]
    want, have = (metric_rows(folder / "run") for folder in folders)
    assert [row["samples"] for row in have] == [row["samples"] for row in want] == list(range(12, 12 * steps + 1, 12))
    for mine, theirs in zip(have, want, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for kind in KINDS:
        one, other = (checkpoint_tensors(f / f"run/checkpoints/step_{steps:08d}", kind) for f in folders)
        assert all(float((other[n] - one[n]).norm() / one[n].norm().clamp_min(1e-6)) < 1e-3 for n in one)


def test_a_signal_to_one_rank_saves_and_exits_75(text_data, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"),
                          train__steps=10_000, checkpoint={"every": 5000})
    log, metrics = tmp_path / "log.txt", tmp_path / "run/metrics.jsonl"
    process = QuickLauncher(["--nproc-per-node", "2", "-m", "hola_megatron.train", str(recipe)], log)
    try:
        deadline = time.time() + 120
        while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGUSR1)
        assert process.wait(120) == 75, log.read_text()[-3000:]
    finally:
        process.send_signal(signal.SIGKILL)
    saved = [path for path in (tmp_path / "run/checkpoints").iterdir()]
    assert len(saved) == 1
    step = json.loads((saved[0] / "manifest.json").read_text())["step"]
    assert f"stopped by SIGUSR1 at step {step:,}" in log.read_text()
