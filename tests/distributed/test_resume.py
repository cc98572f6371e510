"""Resume: bit for bit in the same layout, and into any other layout, optimizer included."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import checkpoint_tensors, metric_rows, run_ranks, start_program, write_recipe
from train.faults import install_named

from hola_megatron.config import load_recipe
from hola_megatron.trainer import train

pytestmark = pytest.mark.distributed

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def recipe_for(folder: Path, data: Path, parallel: dict | None = None) -> Path:
    return write_recipe(folder / "recipe.yaml", data / "train", parallel=parallel or {}, run_dir=str(folder / "run"),
                        train__steps=6, checkpoint={"every": 3, "keep": 5})


def stop_at(step: int, run: Path) -> None:
    """Leave the run as a kill right after `step`'s checkpoint would."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name.split("_")[1]) > step:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


@pytest.fixture(scope="session")
def tp2(tmp_path_factory, text_data) -> Path:
    """Six steps without a stop on two tensor ranks, with checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("tp2")
    recipe = recipe_for(folder, text_data, {"tensor": 2})
    assert run_ranks([str(recipe)], folder / "log.txt", ranks=2).code == 0
    return folder / "run"


def copy_run(run: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(run, to / "run")
    return to / "run"


@pytest.mark.parametrize(("ranks", "parallel"), [
    (2, {"tensor": 2}), (1, {}), (2, {"pipeline": 2}), (2, {"distributed_optimizer": True}),
    (2, {"distributed_optimizer": False}), (2, {"context": 2})],
    ids=["tp2", "tp1", "pp2", "dp2_dist_opt", "dp2", "cp2"])
def test_a_tp2_checkpoint_goes_on_in(ranks, parallel, tp2, text_data, tmp_path):
    run = copy_run(tp2, tmp_path)
    stop_at(3, run)
    recipe = recipe_for(tmp_path, text_data, parallel)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=ranks)
    assert done.code == 0, done.output[-3000:]
    assert "resuming at step 3" in done.output
    rows = metric_rows(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for kind in KINDS:
        want = checkpoint_tensors(tp2 / "checkpoints/step_00000006", kind)
        have = checkpoint_tensors(run / "checkpoints/step_00000006", kind)
        assert want.keys() == have.keys()
        for name, tensor in want.items():
            if parallel == {"tensor": 2}:
                assert torch.equal(have[name], tensor), (kind, name)
            error = float((have[name] - tensor).norm() / tensor.norm().clamp_min(1e-6))
            assert error < 1e-3, (kind, name, error)
    for want, have in zip(metric_rows(tp2), rows, strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5)


def test_the_number_of_processes_may_change_at_every_restart(text_data, tmp_path):
    """4 -> 2 -> 3 -> 1 processes, two steps each: the samples and losses of a run on one."""
    folders = [tmp_path / "whole", tmp_path / "parts"]
    recipes = []
    for folder in folders:
        folder.mkdir()
        recipes.append(write_recipe(
            folder / "recipe.yaml", text_data / "train", run_dir=str(folder / "run"), train__steps=8,
            model__layers=2, model__pattern="HA", train__global_batch_size=12, train__micro_batch_size=1,
            checkpoint={"every": 2, "keep": 9}))
    train(load_recipe(recipes[0]))
    for ranks, last in ((4, 2), (2, 4), (3, 6), (1, 8)):
        done = run_ranks([str(recipes[1])], folders[1] / "log.txt", ranks=ranks,
                         before=partial(install_named, "interrupt@2@0") if last < 8 else None)
        assert done.code == (75 if last < 8 else 0), done.output[-3000:]
        assert last == 2 or f"resuming at step {last - 2}" in done.output, done.output[-3000:]
    want, have = (metric_rows(folder / "run") for folder in folders)
    assert [row["samples"] for row in have] == [row["samples"] for row in want] == list(range(12, 97, 12))
    for mine, theirs in zip(have, want, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for kind in KINDS:
        one, other = (checkpoint_tensors(f / "run/checkpoints/step_00000008", kind) for f in folders)
        assert all(float((other[n] - one[n]).norm() / one[n].norm().clamp_min(1e-6)) < 1e-3 for n in one)


def test_resume_with_the_distributed_optimizer_is_bitwise(text_data, tmp_path):
    folders = [tmp_path / "whole", tmp_path / "parts"]
    for folder in folders:
        folder.mkdir()
        if folder == folders[1]:
            stop_at(3, copy_run(folders[0] / "run", folder))
        recipe = recipe_for(folder, text_data, {"distributed_optimizer": True})
        done = run_ranks([str(recipe)], folder / "log.txt", ranks=2)
        assert done.code == 0, done.output[-3000:]
    assert "resuming at step 3" in done.output
    for kind in KINDS:
        want, have = (checkpoint_tensors(f / "run/checkpoints/step_00000006", kind) for f in folders)
        assert all(torch.equal(have[name], want[name]) for name in want)


def test_a_signal_to_one_rank_saves_and_exits_75(text_data, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"),
                          train__steps=10_000, checkpoint={"every": 5000})
    process = start_program(["-m", "hola_megatron.train", str(recipe)], tmp_path / "log.txt", ranks=2)
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGUSR1)
    assert process.wait(120) == 75, (tmp_path / "log.txt").read_text()[-3000:]
    saved = [path for path in (tmp_path / "run/checkpoints").iterdir()]
    assert len(saved) == 1
    step = json.loads((saved[0] / "manifest.json").read_text())["step"]
    assert f"stopped by SIGUSR1 at step {step:,}" in (tmp_path / "log.txt").read_text()
