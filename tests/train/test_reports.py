"""What only reports cannot end a run: pictures, TensorBoard, Weights & Biases, printed lines, sample texts."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT, metric_rows, run_main, run_ranks, small_recipe
from train.faults import install_named

from hola_megatron.checkpoint.folder import newest_usable
from hola_megatron.log.plot import LossPlot, plot_loss
from hola_megatron.log.reports import Reports


def recipe_in(folder: Path, data: Path, **changes: object) -> Path:
    return small_recipe(folder / "recipe.yaml", data / "train", run_dir=str(folder / "run"),
                        **{"train__steps": 6, "checkpoint__every": 2, "train__global_batch_size": 2, **changes})


@pytest.mark.parametrize("kind", ["a file", "read-only", "full"])
def test_tensorboard_that_cannot_be_written(kind, text_data, tmp_path, capsys):
    board = tmp_path / "run/tensorboard"
    board.parent.mkdir()
    if kind == "a file":
        board.touch()
    else:
        board.mkdir()
        options = ["-o", "ro"] if kind == "read-only" else ["-o", "size=4k"]
        mounted = subprocess.run(["mount", "-t", "tmpfs", *options, "none", board], capture_output=True, check=False)
        if mounted.returncode:
            pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        recipe = recipe_in(tmp_path, text_data, log__tensorboard=True, train__steps=30, checkpoint__every=30,
                           train__global_batch_size=2, model__layers=1, model__pattern="G")
        done = run_main([str(recipe)], capsys)
    finally:
        if kind != "a file":
            subprocess.run(["umount", board], check=True)
    assert done.code == 0 and "Traceback" not in done.output, done.output[-3000:]
    assert done.output.count("report | TensorBoard: ") == 1 and "left alone from here on" in done.output
    assert len(metric_rows(tmp_path / "run")) == 30


def test_a_picture_that_cannot_be_written(text_data, tmp_path, capsys):
    (tmp_path / "run/loss.png/in the way").mkdir(parents=True)
    done = run_main([str(recipe_in(tmp_path, text_data))], capsys)
    assert done.code == 0 and "Traceback" not in done.output, done.output[-3000:]
    assert done.output.count("report | loss.png: ") == 1
    assert newest_usable(tmp_path / "run/checkpoints")[0].step == 6


def test_a_bit_flipped_in_any_key_of_the_metrics(text_data, tmp_path, capsys):
    recipe = recipe_in(tmp_path, text_data)
    assert run_main([str(recipe)], capsys).code == 0
    file = tmp_path / "run/metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for number, (word, other) in enumerate({b'"loss"': b'"mo\\s"', b'"step"': b'"ste0"', b'"kind"': b'"kiod"'}.items()):
        lines[number] = lines[number].replace(word, other)
    lines[3] = lines[3].replace(b'"loss": ', b'"loss":x')
    file.write_bytes(b"".join(lines))
    done = run_main([str(recipe), "--allow-change", "train.steps=8"], capsys)
    assert done.code == 0 and "resuming at step 6" in done.output and "Traceback" not in done.output, done.output
    assert (tmp_path / "run/loss.png").exists()


def _no_reader() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def _reader_that_does_not_read() -> int:
    _, writing = os.pipe()
    flags = fcntl.fcntl(writing, fcntl.F_GETFL)
    fcntl.fcntl(writing, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    try:
        while os.write(writing, b"x" * 4096):
            pass
    except BlockingIOError:
        fcntl.fcntl(writing, fcntl.F_SETFL, flags)
    return writing


def _full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def _instead(what: str, *numbers: int, fault: str = "") -> None:
    """In the rank: descriptors lead elsewhere."""
    for number in numbers:
        os.dup2({"no reader": _no_reader, "not read": _reader_that_does_not_read, "full": _full}[what](), number)
    if fault:
        install_named(fault)


@pytest.mark.parametrize(("what", "numbers", "code"), [
    ("no reader", (1,), 0), ("no reader", (1, 2), 75), ("not read", (1,), 0), ("not read", (1,), 75),
    ("full", (1,), 75), ("full", (1, 2), 0)])
def test_output_that_cannot_be_written(what, numbers, code, text_data, tmp_path):
    fault = "interrupt@3" if code else ""
    done = run_ranks([str(recipe_in(tmp_path, text_data))], tmp_path / "log.txt", ranks=1,
                     before=partial(_instead, what, *numbers, fault=fault), timeout=60)
    assert done.code == code, done.output
    assert newest_usable(tmp_path / "run/checkpoints")[0].step == (3 if code else 6)
    told = done.output.count("report | stdout cannot be written")
    assert told == (1 if what != "not read" and numbers == (1,) else 0) and "Traceback" not in done.output


def test_output_of_a_real_process_that_is_closed(text_data, tmp_path):
    recipe = recipe_in(tmp_path, text_data)
    done = subprocess.run(["bash", "-c", f"exec {sys.executable} -m hola_megatron.train {recipe} >&- 2>&-"], cwd=ROOT,
                          check=False, timeout=300)
    assert done.returncode == 0
    assert newest_usable(tmp_path / "run/checkpoints")[0].step == 6


def _latin_1() -> None:
    """As PYTHONIOENCODING=latin-1 makes them."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="latin-1", errors="strict")


def test_output_that_cannot_hold_a_sample(text_data, tmp_path):
    recipe = recipe_in(tmp_path, text_data, log__sample_every=2, log__sample_prompt="日本語 – ", log__sample_tokens=4)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1, before=_latin_1)
    assert done.code == 0 and newest_usable(tmp_path / "run/checkpoints")[0].step == 6, done.output
    assert r"sample | '\u65e5\u672c\u8a9e \u2013 " in done.output and "finished: 6 steps" in done.output


def test_a_sample_from_a_model_of_nan_does_not_end_the_run_before_the_rewind(text_data, tmp_path):
    recipe = recipe_in(tmp_path, text_data, data__valid=str(text_data / "valid"), valid={"every": 1, "samples": 8},
                       log__sample_every=1, log__sample_tokens=2, guard__max_skips=0)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1, before=partial(install_named, "nan_after@3"))
    assert done.code == 0 and "Traceback" not in done.output, done.output[-3000:]
    assert "sample | none: the model's logits are not finite" in done.output
    assert "rewound | from step 4" in done.output and "finished: 6 steps" in done.output


def test_a_sample_of_nothing_but_the_model_s_own(text_data, tmp_path, capsys):
    recipe = recipe_in(tmp_path, text_data, log__sample_every=3, log__sample_tokens=2, log__sample_prompt="")
    done = run_main([str(recipe)], capsys)
    assert done.code == 0 and done.output.count("sample | ") == 2, done.output[-3000:]


WANDB = """
class Run:
    def log(self, *args, **kwargs): raise ConnectionError("api.wandb.ai")
    def finish(self): raise ConnectionError("api.wandb.ai")
def init(**kwargs):
    {init}
"""


@pytest.mark.parametrize("init", ["return Run()", "raise RuntimeError('api_key not configured')"])
def test_errors_of_weights_and_biases(init, text_data, tmp_path, monkeypatch, capsys):
    """The package raises: it is not ours, and not needed to see what we do then."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text(WANDB.format(init=init))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    try:
        done = run_main([str(recipe_in(tmp_path, text_data, log__wandb_project="p"))], capsys)
    finally:
        sys.modules.pop("wandb", None)  # not by monkeypatch, which would put it back for the tests that follow
    assert done.code == 0 and "Traceback" not in done.output, done.output[-3000:]
    assert done.output.count("report | Weights & Biases: ") == 1


def test_the_picture_is_drawn_beside_the_run(tmp_path):
    """In CPU time of the training process, which is what a step may lose."""
    row = {"kind": "train", "loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n, **row}) + "\n" for n in range(1, 20_001)))
    plot_loss(tmp_path, "imports paid")
    began = time.process_time()
    plot_loss(tmp_path, "here")
    here = time.process_time() - began
    (tmp_path / "loss.png").unlink()
    plot = LossPlot(tmp_path, "beside", Reports())
    began = time.process_time()
    plot.begin()
    beside = time.process_time() - began
    deadline = time.monotonic() + 120
    while not (tmp_path / "loss.png").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    plot.close()
    assert (tmp_path / "loss.png").exists() and beside < here / 4, (beside, here)
