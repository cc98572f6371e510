"""Tasks inside the run: the numbers of the exported model, on one rank or two, and training as without them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers import metric_rows, run_main, run_ranks, small_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluate"))
from task_files import hub, write

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None,
                                   reason="lm_eval not installed (pip install 'lm-eval[hf]')")
TASKS = ["piqa", "lambada_openai", "wikitext"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    for task in ("piqa", "lambada_openai", "wikitext", "fda"):
        write(folder, f"{task}.jsonl", hub()[task])
    return folder


def recipe_in(folder: Path, text_data: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return small_recipe(folder / "recipe.yaml", text_data / "train", run_dir=str(folder / "run"), train__steps=4,
                        train__sequence_length=128, **changes)


def tasks_of(records: Path, **changes) -> dict:
    return {"valid": {"every": 2, "tasks": TASKS, "tasks_data": str(records), **changes}}


@needs_harness
def test_numbers_are_those_of_the_export_and_training_goes_on_as_without(records, text_data, tmp_path, capsys):
    from hola_megatron.evaluate.harness.adapter import HarnessModel
    from hola_megatron.evaluate.harness.tasks import load_task, run_task
    from hola_megatron.evaluate.load import exported, load
    from hola_megatron.evaluate.reader import ModelReader

    done = run_main([str(recipe_in(tmp_path / "with", text_data, **tasks_of(records)))], capsys)
    assert done.code == 0 and done.output.count("tasks | step ") == 2, done.output
    line = next(line for line in done.output.splitlines() if line.startswith("tasks | step 4 | piqa acc 0."))
    assert "lambada_openai perplexity" in line and line.endswith("of the time since the last") and " s, " in line
    rows = metric_rows(tmp_path / "with/run", "tasks")
    assert [row["step"] for row in rows] == [2, 4] and rows[0]["seconds"] > 0 and 0 < rows[0]["share_of_time"] <= 1
    with exported(tmp_path / "with/run") as folder:
        model, tokenizer = load(folder, dtype=torch.float32, device="cpu")
    harness = HarnessModel(ModelReader(model, tokenizer, window=128), tokenizer, 128)
    for task in TASKS:
        for metric, value in run_task(harness, task, load_task(task, records)).metrics.items():
            assert rows[1][f"{task}/{metric}"] == pytest.approx(value, rel=1e-4), (task, metric)
    assert rows[0]["wikitext/bits_per_byte"] != rows[1]["wikitext/bits_per_byte"]
    assert run_main([str(recipe_in(tmp_path / "without", text_data))], capsys).code == 0
    losses = [[(row["loss"], row["grad_norm"]) for row in metric_rows(tmp_path / name / "run", "train")]
              for name in ("with", "without")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@needs_harness
@pytest.mark.distributed
def test_two_ranks_share_the_items(records, text_data, tmp_path, capsys):
    """And logits in small pieces, every second step by tasks_every, three items a task."""
    changes = tasks_of(records, every=4, tasks_every=2, tasks_limit=3) | {"train__logits_budget_gb": 1e-4}
    done = run_ranks([str(recipe_in(tmp_path / "two", text_data, **changes))], tmp_path / "log", ranks=2)
    assert done.code == 0 and done.output.count("tasks | step ") == 2, done.output[-3000:]
    assert run_main([str(recipe_in(tmp_path / "one", text_data, **changes))], capsys).code == 0
    for have, want in zip(*(metric_rows(tmp_path / name / "run", "tasks") for name in ("two", "one")), strict=True):
        for name in want.keys() - {"seconds", "share_of_time"}:
            assert have[name] == (want[name] if isinstance(want[name], str) else pytest.approx(want[name], rel=1e-3))
    assert want["piqa/acc"] in (0, 1 / 3, 2 / 3, 1)


@needs_harness
@pytest.mark.parametrize(("tasks", "code", "said"), [
    (["fda"], 2, "valid.tasks: fda ask for written answers"),
    (["sciq"], 3, "has no file of the task sciq"), (["piqa", 3], 2, "valid.tasks")])
def test_what_cannot_be_run_ends_before_training(tasks, code, said, records, text_data, tmp_path, capsys):
    done = run_main([str(recipe_in(tmp_path / "x", text_data, **tasks_of(records, tasks=tasks)))], capsys)
    assert done.code == code and said in done.output and "step 1/" not in done.output, done.output
    assert "Traceback" not in done.output


def test_the_package_is_asked_for(records, text_data, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "lm_eval" else find(name, *rest))
    done = run_main([str(recipe_in(tmp_path / "x", text_data, **tasks_of(records)))], capsys)
    assert done.code == 2 and "valid.tasks: needs the package lm_eval" in done.output
    assert "pip install -e '.[eval]'), or set valid.tasks=null" in done.output

