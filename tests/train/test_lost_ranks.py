"""A rank that hangs, stops or dies: all ranks end, the rank and the last step are named, code 76."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed.forked import run_on_ranks
from helpers import ROOT, run_ranks, small_recipe
from torch.distributed import TCPStore
from train.faults import install_named
from train.quick_launch import SECONDS, launch_quickly

from hola_megatron.config import load_recipe
from hola_megatron.control import watchdog
from hola_megatron.control.blame import blame

pytestmark = pytest.mark.distributed

HANG_SECONDS = 5
# two looks at what all ranks say take a few seconds; the documents add the 30 that a rank which cannot end itself
# gets from the launcher, here 3
STATED_SECONDS = HANG_SECONDS + 15 + SECONDS


FAULTS = {"hang": "hang@4@1", "stopped": "stopped@4@1", "killed": "die@4@1"}


@dataclass
class Ended:
    """How a run with a fault ended, and how many seconds after the fault."""

    run: Path
    code: int
    output: str
    seconds: float


def run_with(fault: str, folder: Path, data: Path) -> Ended:
    run = folder / "run"
    recipe = small_recipe(folder / "recipe.yaml", data / "train", run_dir=str(run), train__steps=50,
                          parallel__hang_seconds=HANG_SECONDS, checkpoint={"every": 2, "background": False})
    done = launch_quickly(["tests/train/faults.py", fault, str(recipe)], folder / "log.txt", ranks=2)
    return Ended(run, done.code, done.output, time.time() - (run / "metrics.jsonl").stat().st_mtime)


@pytest.fixture(scope="module")
def ended(text_data, tmp_path_factory) -> dict[str, Ended]:
    """A run for each fault, side by side: they mostly wait."""
    with ThreadPoolExecutor(len(FAULTS)) as pool:
        runs = {kind: pool.submit(run_with, fault, tmp_path_factory.mktemp(kind), text_data)
                for kind, fault in FAULTS.items()}
    return {kind: run.result() for kind, run in runs.items()}


@pytest.mark.parametrize(("kind", "said"), [
    ("hang", "hangs in hang (faults.py:"), ("stopped", "rank 1 no longer answers"), ("killed", "rank 1 has died")])
def test_a_lost_rank_is_named_and_ends_the_run(kind, said, ended):
    found = ended[kind]
    assert found.code == 76 and "Traceback" not in found.output, found.output[-3000:]
    assert found.output.count("LostError") == 1 and said in found.output, found.output[-3000:]
    assert "rank 1" in found.output and "after step 3" in found.output
    assert "start the same command again" in found.output
    assert found.seconds < STATED_SECONDS
    assert (found.run / "checkpoints/step_00000002/manifest.json").exists()
    if kind != "killed":
        assert "train_step" in (found.run / "hang/rank-00000.txt").read_text()


def said(step: int, waits: bool, where: str, host: str = "a") -> dict:
    return {"step": step, "waits": waits, "phase": "step", "where": where, "host": host}


@pytest.mark.parametrize(("seen", "wanted"), [
    # the host of a GPU waits where results are read back, not in torch's collectives
    ({0: (said(7, True, "_sum_over_ranks"), True), 1: (said(7, False, "record (shards.py:9)", "b"), True)},
     "rank 1 on b hangs in record (shards.py:9), step, after step 7; rank 0 waits"),
    ({0: (said(7, False, "x"), True), 1: (said(6, True, "y"), True), 2: (said(7, False, "x"), True)},
     "rank 1 on a hangs in y"),
    ({0: (said(7, True, "x"), True), 1: (said(7, True, "y"), True)}, "which of them hangs is not known"),
    ({0: (said(7, True, "x"), True), 1: (said(7, True, "x", "b"), False), 2: (None, False)},
     "ranks 1, 2 no longer answers (on b); rank 0 waits")])
def test_who_is_blamed(seen, wanted):
    text = blame(seen)
    assert wanted in text and ("is not known" in wanted or "is not known" not in text), text


def test_the_end_is_explained_once_whoever_looks_last(monkeypatch, tmp_path):
    """A rank that looks when the first has explained the end and left found itself the first alive, and explained."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    said = []
    monkeypatch.setattr(watchdog, "leave", said.append)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    first, later = (watchdog.Watchdog(SimpleNamespace(rank=rank, world=2), tmp_path, None) for rank in range(2))
    first.start()
    later.start()
    first._end(1.0)
    first.stop()
    later._end(1.0)
    lost = str(later.lost_peer(RuntimeError("connection closed by peer")))
    later.stop()
    assert len(said) == 1 and "rank 0 ended the run" in lost, (said, lost)


def test_a_slow_rank_is_named(text_data, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=6,
                          log__every=6, log__straggler_ratio=2.0)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=2, before=partial(install_named, "slow@1+@1"))
    assert done.code == 0 and "slow | rank 1 on " in done.output and "slow | rank 0" not in done.output


def test_bad_numbers_on_one_rank_are_refused_by_all(text_data, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=4,
                          parallel__distributed_optimizer=True)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=2, before=partial(install_named, "nan_gradient@3@1"))
    assert done.code == 0, done.output[-3000:]
    assert done.output.count("skipped | step 3 | grad_norm nan is not finite | samples 16 to 23") == 1
    assert "gradient of model.layers.1.mlp.gate_proj.weight" in done.output


def print_timeout(rank: int, ranks: int, folder: Path) -> None:
    from megatron.core import parallel_state

    from hola_megatron.startup.start import start, stop

    start(load_recipe(ROOT / "recipes/hola_tiny.yaml", ["parallel.timeout_minutes=0.25"]))
    group = parallel_state.get_tensor_model_parallel_group()
    (folder / "timeout").write_text(str(group._get_backend(torch.device("cpu")).options._timeout.total_seconds()))
    stop()


def test_groups_wait_as_long_as_the_recipe_says_to_the_second(tmp_path):
    """parallel.timeout_minutes below one was one once."""
    run_on_ranks(print_timeout, 1, tmp_path)
    assert (tmp_path / "timeout").read_text() == "15.0"
