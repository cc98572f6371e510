"""Runs whose batch grows, and runs that are made longer: what is read and counted over stops and other ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import checkpoint_tensors, metric_rows, run_main, run_ranks, small_recipe
from train.faults import install_named

RAMP = [{"batch": 4, "steps": 2}, {"batch": 8, "steps": 3}]
SAMPLES = [4, 8, 16, 24, 32, 48, 64, 80]


def recipe_in(folder: Path, data: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return small_recipe(folder / "recipe.yaml", data / "train", run_dir=str(folder / "run"), **{
        "train__steps": 8, "train__global_batch_size": 16, "train__batch_ramp": RAMP, "train__micro_batch_size": 2,
        "checkpoint": {"every": 8, "keep": 9}, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text_data) -> Path:
    from hola_megatron.config import load_recipe
    from hola_megatron.train.loop import train

    folder = tmp_path_factory.mktemp("whole")
    train(load_recipe(recipe_in(folder, text_data)))
    return folder


def last(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint_tensors(folder / "run/checkpoints/step_00000008")


def test_the_samples_of_every_step(whole):
    rows = metric_rows(whole / "run")
    assert [row["samples"] for row in rows] == SAMPLES
    assert [row["tokens"] for row in rows] == [64 * n for n in SAMPLES]
    assert rows[-1]["eta_seconds"] == 0 and all(row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_stop_in_the_ramp_changes_nothing(step, whole, text_data, tmp_path, capsys):
    recipe = recipe_in(tmp_path / "parts", text_data)
    stopped = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1,
                        before=partial(install_named, f"interrupt@{step}"))
    assert stopped.code == 75, stopped.output[-2000:]
    done = run_main([str(recipe)], capsys)
    assert done.code == 0 and f"resuming at step {step}" in done.output
    assert "8 of 1.02k tokens = 5.12k" in done.output
    assert "batches  4 samples a step for 2 steps, 8 samples a step for 3 steps, then 16" in done.output
    assert "finished: 8 steps, 5.12k tokens" in done.output
    assert all(torch.equal(value, last(whole)[name]) for name, value in last(tmp_path / "parts").items())


@pytest.mark.distributed
def test_two_ranks_read_the_same(whole, text_data, tmp_path):
    done = run_ranks([str(recipe_in(tmp_path / "two", text_data))], tmp_path / "log.txt", ranks=2)
    assert done.code == 0, done.output[-3000:]
    for want, have in zip(metric_rows(whole / "run"), metric_rows(tmp_path / "two/run"), strict=True):
        assert have["samples"] == want["samples"]
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5)


def test_an_incident_names_the_samples_of_its_step(text_data, tmp_path):
    recipe = recipe_in(tmp_path / "bad", text_data, train__batch_ramp=[{"batch": 4, "steps": 3}])
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1, before=partial(install_named, "nan_gradient@3"))
    assert done.code == 0 and "skipped | step 3 |" in done.output, done.output[-3000:]
    assert "| samples 8 to 11 |" in done.output


def test_a_longer_cosine_says_what_happens_to_the_rate(text_data, tmp_path, capsys):
    recipe = recipe_in(tmp_path / "more", text_data, train__batch_ramp=None, train__steps=4, train__warmup_steps=0,
                       train__global_batch_size=2)
    assert run_main([str(recipe)], capsys).code == 0
    done = run_main([str(recipe), "train.steps=8"], capsys)
    assert done.code == 0 and "changed | train.steps: 4 -> 8" in done.output
    assert "changed | learning rate of step 5: 0 -> 0.001166; schedule: 0.003, cosine to 0 at step 8" in done.output
