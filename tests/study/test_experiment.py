"""tools/experiment.py with its real workers: it runs, goes on, leaves others' runs alone, and reports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time as clock
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import run_tool

from hola_megatron.errors import RecipeError
from hola_megatron.study.runs import runs_of
from hola_megatron.study.start import chosen_gpus, places
from hola_megatron.study.table import load_study

ROOT = Path(__file__).parents[2]


def report_of(out) -> str:
    return (out / "report.md").read_text()


def test_a_study_runs_goes_on_and_is_reported(make, tmp_path, capsys):
    path, out = make(baseline="gdn"), tmp_path / "out"
    command = [str(path), "--out", str(out), "--jobs", "1"]
    held = FileLock(out / "oracle/seed-2/run.lock")
    (out / "oracle/seed-2").mkdir(parents=True)
    with held:  # as another process would
        first = run_tool("experiment", command, capsys)
    assert first.code == 1 and "5 of 6 runs are finished" in first.output, first.output
    assert "oracle, seed 2: another process works on it" in first.output
    assert "later: not run, this version's recipes do not support it: model.cache.score" in first.output
    times = {file: file.stat().st_mtime_ns for file in out.glob("*/*/done.json")}
    assert len(times) == 5 and "Not finished: oracle, seed 2." in report_of(out)
    second = run_tool("experiment", command, capsys)
    assert second.code == 0 and "6 runs, 1 to do" in second.output, second.output
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    check_report(report_of(out), out)
    assert run_tool("experiment", [*command, "--report"], capsys).code == 0
    changed = run_tool("experiment", [*command, "--set", "train.steps=4"], capsys)
    assert changed.code == 2 and "was finished with another recipe" in changed.output


def check_report(text: str, out) -> None:
    """The report's tables hold the runs' own numbers."""
    assert "6 of 6 runs are finished." in text and "**pays: no** (0 of 2 seeds reach it)" in text
    assert re.search(r"\* later \(\): model.cache.score: 'nothing' is not allowed", text)
    for arm in ("gdn", "betae", "oracle"):
        for seed in (1, 2):
            done = json.loads((out / arm / f"seed-{seed}/done.json").read_text())
            for group in ("loss", "accuracy/", "kept/"):  # one table each
                values = [f"{value:.3f}" for name, value in done["measures"].items() if name.startswith(group)]
                assert not values or f"| {arm} | {seed} | {' | '.join(values)} |" in text
            assert done["device"] in text and done["code"] in text and done["versions"]["torch"] in text
    losses = {arm: [json.loads((out / arm / f"seed-{seed}/done.json").read_text())["measures"]["loss"]
                    for seed in (1, 2)] for arm in ("gdn", "betae")}
    mean = sum(losses["betae"]) / 2 - sum(losses["gdn"]) / 2
    assert re.search(rf"## Differences from gdn.*\| betae \| {mean:.3f} ± ", text, re.S)
    for picture in ("curves.png", "accuracy.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG") and f"]({picture})" in text


def test_runs_that_fail_are_named_and_tried_again(make, tmp_path, capsys):
    model = {"train.learning_rate": 1e15, "train.steps": 14, "train.clip_grad_norm": 0}
    path, out = make(seeds=[1], rules=[], arms=[{"name": "wild", "overrides": model}]), tmp_path / "out"
    done = run_tool("experiment", [str(path), "--out", str(out)], capsys)
    assert done.code == 1 and "wild, seed 1: failed: step " in done.output, done.output
    assert "Failed; the same command tries them again" in report_of(out) and not list(out.glob("*/*/done.json"))
    run = runs_of(load_study(path), out)[0]
    assert "is not finite" in run.failed["problem"]


def test_a_job_array_has_one_task_for_every_run(make, tmp_path, capsys, monkeypatch):
    path, out = make(), tmp_path / "out"
    done = run_tool("experiment", [str(path), "--out", str(out), "--slurm", "partition=gpu", "gpus=1"], capsys)
    assert done.code == 0 and f"sbatch --array=0-5 {out / 'array.sh'}" in done.output
    script = (out / "array.sh").read_text()
    assert "#SBATCH --partition=gpu\n#SBATCH --gpus=1\n" in script
    subprocess.run(["bash", "-n", str(out / "array.sh")], check=True)
    assert not list(out.glob("*/*/done.json"))
    shown = run_tool("experiment", [str(path), "--out", str(out), "--list"], capsys).output
    assert len(re.findall(r"^ +\d+ .* to do$", shown, re.M)) == 6 and "not supported" in shown


@pytest.mark.long
def test_a_killed_study_leaves_no_worker_and_goes_on(make, tmp_path, capsys):
    path, out = make(arms=[{"name": "gdn", "overrides": {"model.pattern": "G", "train.steps": 60}}], rules=[],
                     seeds=[1, 2, 3, 4]), tmp_path / "out"
    command = [str(path), "--out", str(out), "--jobs", "1"]
    study = subprocess.Popen([sys.executable, str(ROOT / "tools/experiment.py"), *command], stdout=subprocess.DEVNULL)
    first = out / "gdn/seed-1/done.json"
    wait_for(first.exists)
    study.kill()
    study.wait()
    runs = runs_of(load_study(path), out)
    wait_for(lambda: not any(run.is_locked for run in runs))
    time, left = first.stat().st_mtime_ns, sum(not run.done for run in runs)
    assert left
    done = run_tool("experiment", command, capsys)
    assert done.code == 0 and f"4 runs, {left} to do" in done.output and first.stat().st_mtime_ns == time


def wait_for(condition, seconds: float = 300) -> None:
    end = clock.monotonic() + seconds
    while not condition():
        assert clock.monotonic() < end
        clock.sleep(0.1)


@pytest.mark.long
def test_a_task_of_the_array_does_its_own_run(make, tmp_path, capsys, monkeypatch):
    path, out = make(), tmp_path / "out"
    run_tool("experiment", [str(path), "--out", str(out), "--slurm"], capsys)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    subprocess.run(["bash", str(out / "array.sh")], check=True, capture_output=True)
    assert [str(file.parent.relative_to(out)) for file in out.glob("*/*/done.json")] == ["betae/seed-2"]


@pytest.mark.long
def test_recipes_train_on_their_own_data_and_commands_follow(make, tmp_path, text_data, capsys):
    """With a command before, one after that writes measures, and an arm whose trainer fails."""
    recipe = {"data.train": str(text_data / "train"), "data.valid": str(text_data / "valid"),
              "data.documents": "separate", "model.vocab_size": 264, "train.sequence_length": 64, "train.steps": 2,
              "valid.every": 2, "valid.samples": 2}
    write = "from pathlib import Path; Path(r'{measures}/mine.json').write_text('{\"deep\": {\"x\": {seed}}}')"
    path = make(task=None, rules=[], overrides=recipe, seeds=[3], before=["mkdir -p {out}/made"],
                after=[f"python -c \"{write.replace(chr(34), chr(92) + chr(34))}\""],
                arms=[{"name": "good"}, {"name": "bad", "overrides": {"data.train": "nowhere"}}])
    out = tmp_path / "out"
    done = run_tool("experiment", [str(path), "--out", str(out)], capsys)
    assert done.code == 1 and "bad, seed 3: failed:" in done.output and "ended with code 3" in done.output, done.output
    record = json.loads((out / "good/seed-3/done.json").read_text())
    assert record["measures"]["mine/deep/x"] == 3 and record["measures"]["valid/loss"] > 1
    assert (out / "made").is_dir() and len(record["commands"]) == 2


def test_gpus_are_those_that_can_be_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert chosen_gpus("all") == ["2", "GPU-abc"] and chosen_gpus("none") == []
    assert chosen_gpus("GPU-abc") == ["GPU-abc"]
    with pytest.raises(RecipeError, match="--gpus: '0' is not a visible GPU; give all, none, or some of: 2, GPU-abc"):
        chosen_gpus("0,2")


def test_workers_share_gpus_or_have_several():
    of = {"per_gpu": 1, "gpus_per_run": 1, "jobs": None, "runs": 99}
    gpus = ["0", "1", "2", "3"]
    assert [p.gpus for p in places(gpus, **{**of, "per_gpu": 2})] == [(g,) for g in gpus * 2]
    assert [p.gpus for p in places(gpus, **{**of, "gpus_per_run": 2})] == [("0", "1"), ("2", "3")]
    assert [p.gpus for p in places(gpus, **{**of, "runs": 2})] == [("0",), ("1",)]
    assert [p.gpus for p in places([], **{**of, "jobs": 3})] == [()] * 3
    assert places(gpus, **of)[1].environment["CUDA_VISIBLE_DEVICES"] == "1"
    for wrong in ({"jobs": 2}, {"gpus_per_run": 5}, {"gpus_per_run": 2, "per_gpu": 2}):
        with pytest.raises(RecipeError):
            places(gpus, **{**of, **wrong})
    with pytest.raises(RecipeError, match="sees no GPU"):
        places([], **{**of, "per_gpu": 2})
