"""A run that goes on with another mixture: what is read, counted and kept, and that restarts change nothing."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import checkpoint_tensors, metric_rows, run_main, run_ranks, small_recipe
from train.faults import install_named

from hola_megatron.checkpoint.folder import MANIFEST, _seal, open_checkpoint

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def recipe_in(folder: Path, train: object, steps: int = 8, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return small_recipe(folder / "recipe.yaml", Path(), run_dir=str(folder / "run"), data__train=train,
                        train__steps=steps, train__schedule="constant",
                        checkpoint={"every": 4, "keep": 9}, **changes)


@pytest.fixture(scope="module")
def sources(text_data) -> dict[str, object]:
    a, b = str(text_data / "train"), str(text_data / "valid")
    return {"A": a, "AB": [{"path": a, "weight": 1.0}, {"path": b, "weight": 1.0}]}


@pytest.fixture
def four(tmp_path, sources, capsys) -> Path:
    """Four steps of A alone."""
    assert run_main([str(recipe_in(tmp_path / "whole", sources["A"], 4))], capsys).code == 0
    return tmp_path


def same_tensors(one: Path, other: Path) -> bool:
    held = [[checkpoint_tensors(path / "run/checkpoints/step_00000008", kind) for kind in KINDS]
            for path in (one, other)]
    return all(torch.equal(x[name], y[name]) for x, y in zip(*held, strict=True) for name in x)


def without_phases(checkpoint: Path) -> None:
    """As a version that knew no phases saved it."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["trainer"]["phases"]
    manifest["sha256"] = _seal(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_streams_are_counted_and_go_on_and_a_restart_changes_nothing(four, sources, capsys):
    for name in ("parts", "old"):
        shutil.copytree(four / "whole", four / name)
    done = run_main([str(recipe_in(four / "whole", sources["AB"])), "--allow-change"], capsys)
    assert done.code == 0 and "phase 2, from sample 32 of the run: train 50.0% (on from its sample 32), valid 50.0% " \
        "(on from its sample 0)" in done.output
    row = metric_rows(four / "whole/run")[-1]
    assert row["samples"] == 64 and row["tokens"] == 64 * 64 == row["tokens/train"] + row["tokens/valid"]
    # half of 32 samples, up to how a cycle of 1,000 begins
    assert 64 * 4 < row["tokens/valid"] < 64 * 28 and row["tokens/train"] > 64 * 32

    without_phases(four / "old/run/checkpoints/step_00000004")
    assert run_main([str(recipe_in(four / "old", sources["AB"])), "--allow-change"], capsys).code == 0
    assert same_tensors(four / "whole", four / "old")

    again = recipe_in(four / "parts", sources["AB"])
    stopped = run_ranks([str(again), "--allow-change"], four / "log.txt", ranks=1,
                        before=partial(install_named, "interrupt@2"))
    assert stopped.code == 75, stopped.output[-3000:]
    assert run_main([str(again)], capsys).code == 0  # the change is allowed already
    assert same_tensors(four / "whole", four / "parts")
    kept = [open_checkpoint(four / n / "run/checkpoints/step_00000008").manifest["trainer"] for n in ("whole", "parts")]
    assert kept[0] == kept[1] and len(kept[0]["phases"]) == 2


@pytest.mark.distributed
def test_other_ranks_read_the_same_samples_after_the_change(four, sources, capsys):
    shutil.copytree(four / "whole", four / "parts")
    assert run_main([str(recipe_in(four / "whole", sources["AB"])), "--allow-change"], capsys).code == 0
    done = run_ranks([str(recipe_in(four / "parts", sources["AB"])), "--allow-change"], four / "log.txt", ranks=2)
    assert done.code == 0, done.output[-3000:]
    for want, have in zip(*(metric_rows(four / name / "run") for name in ("whole", "parts")), strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert (have["samples"], have["tokens"]) == (want["samples"], want["tokens"])


def test_a_changed_batch_size_counts_the_samples_that_were_read(four, sources, capsys):
    recipe = recipe_in(four / "whole", sources["A"], train__global_batch_size=16)
    done = run_main([str(recipe), "--allow-change"], capsys)
    assert done.code == 0 and "resuming at step 4 (2.05k tokens)" in done.output
    assert "8 of 1.02k tokens = 6.14k" in done.output  # 4 steps of 8 samples, and 4 of 16
    assert "finished: 8 steps, 6.14k tokens" in done.output
    assert [row["tokens"] for row in metric_rows(four / "whole/run")] == [
        512, 1024, 1536, 2048, 3072, 4096, 5120, 6144]


def test_the_banner_says_how_often_each_stream_is_read(tmp_path, text_data, capsys):
    a, b = text_data / "train", text_data / "valid"
    samples = json.loads((b / "dataset.json").read_text())["samples"]
    steps = 5 * samples * 1000 // 8 // 998  # the second stream gets 998 of 1000
    recipe = recipe_in(tmp_path, [{"path": str(a), "weight": 2.0}, {"path": str(b), "weight": 998.0}], 2,
                       valid={"every": 100})
    done = run_main([str(recipe), f"train.steps={steps}", "guard.max_skips=0", "train.learning_rate=1e15",
                     "guard.max_rewinds=0", "train.warmup_steps=0"], capsys)
    assert "streams  train 0.2%, valid 99.8%" in done.output
    assert f"(epochs: train 0.0{'0'}" in done.output and "valid 5.00)" in done.output, done.output[:3000]
