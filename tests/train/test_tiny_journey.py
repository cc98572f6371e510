"""The journeys of docs/continue.md on hola_tiny itself, by the real programs, each of one command."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ROOT, Finished, metric_rows, run_program

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Prepared text, and 30 steps of hola_tiny."""
    folder = tmp_path_factory.mktemp("tiny")
    for part in ("train", "valid"):
        done = run_program(["tools/prepare_data.py", "--bundled", part, "--tokenizer", "bytes", "--sequence-length",
                            "256", "--out", str(folder / part)], folder / "log.txt")
        assert done.code == 0, done.output
    done = train(folder, "base", "train.steps=30")
    assert done.code == 0, done.output[-3000:]
    return folder


def train(folder: Path, name: str, *options: str) -> Finished:
    return run_program(["-m", "hola_megatron.train", "recipes/hola_tiny.yaml", f"name={name}",
                        f"run_dir={folder / name}", f"data.train={folder / 'train'}", f"data.valid={folder / 'valid'}",
                        "checkpoint.every=10", "valid.every=10", "valid.samples=16", "log.sample_every=null",
                        "log.every=1", *options], folder / "log.txt")


def first_loss(folder: Path, name: str) -> float:
    return metric_rows(folder / name)[0]["loss"]


def test_continued_pretraining(base):
    done = train(base, "more", f"init.from={base / 'base'}", "train.lr=3e-4", "train.min_lr=3e-5", "train.steps=20")
    assert done.code == 0, done.output[-3000:]
    assert "moments of zero | streams go on after 61.4k tokens" in done.output
    before, after = (metric_rows(base / name, "valid")[-1]["loss"] for name in ("base", "more"))
    assert after < before and first_loss(base, "more") < first_loss(base, "base") - 2
    assert "finished: 20 steps, 102k tokens" in done.output


@pytest.mark.parametrize(("length", "steps"), [(2048, 10), (32768, 1)])
def test_longer_context(length, steps, base):
    done = train(base, f"long{length}", f"init.from={base / 'base'}", "train.lr=3e-4", "train.min_lr=3e-5",
                 f"train.sequence_length={length}", "train.global_batch_size=1", "train.micro_batch_size=1",
                 f"train.steps={steps}", "train.warmup_steps=0", "valid.samples=1")
    assert done.code == 0, done.output[-3000:]
    assert f"samples of 256 tokens are cut anew to {length:,}" in done.output
    rows = metric_rows(base / f"long{length}")
    assert all(0.95 * length < row["loss_tokens"] <= length for row in rows)
    # the model is that of the run before: its loss is not that of a new one
    assert rows[0]["loss"] == pytest.approx(metric_rows(base / "base")[-1]["loss"], abs=0.5)


def test_a_cooldown_a_mean_and_a_picture(base):
    done = train(base, "cooled", f"init.from={base / 'base/checkpoints/step_00000020'}", "init.optimizer=keep",
                 "train.schedule=linear", "train.warmup_steps=0", "train.steps=10")
    assert done.code == 0 and "moments of 20 updates" in done.output, done.output[-3000:]
    rates = [row["learning_rate"] for row in metric_rows(base / "cooled")]
    assert rates[0] == 3e-3 and rates[-1] == pytest.approx(3e-4) and rates == sorted(rates, reverse=True)
    made = run_program(["tools/checkpoint.py", "average", str(base / "base"), "--last", "2", "--out",
                        str(base / "mean")], base / "log.txt")
    assert made.code == 0, made.output
    drawn = run_program(["tools/plot.py", str(base / "base"), str(base / "cooled"), "--out", str(base / "curves.png")],
                        base / "log.txt")
    assert drawn.code == 0 and "| cooled | 10 |" in drawn.output and (base / "curves.png").exists(), drawn.output
    assert not (ROOT / "curves.png").exists()
