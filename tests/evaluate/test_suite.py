"""Intervals, stored results, tables, and several models and processes."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
from helpers import run_program, run_tool
from task_files import hub, write
from tiny import export, recipe

from hola_megatron.errors import RecipeError
from hola_megatron.evaluate.suite import paper
from hola_megatron.evaluate.suite.intervals import Measure, bootstrap, measured, shown, wilson
from hola_megatron.evaluate.suite.report import markdown
from hola_megatron.evaluate.suite.results import Outcome, Store, model_digest

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None,
                                   reason="lm_eval not installed (pip install 'lm-eval[hf]')")


def test_wilson_by_hand():
    """Its ends are where a test of the share itself is on the edge: |share - p| = z sqrt(p (1 - p) / n)."""
    for right, items in ((0, 10), (3, 20), (10, 20), (481, 500), (7, 7)):
        for p in wilson(right, items):
            edge = 1.959963984540054 * math.sqrt(p * (1 - p) / items)
            assert abs(right / items - p) == pytest.approx(edge, abs=1e-12)
    assert wilson(0, 10)[0] == 0 and wilson(7, 7)[1] == 1


def test_bootstrap_is_near_the_normal_interval():
    values = list(np.random.default_rng(3).normal(2.0, 1.0, 400))
    low, high = bootstrap(values, lambda x: sum(x) / len(x))
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values)) / 20
    assert low == pytest.approx(mean - half, abs=0.02) and high == pytest.approx(mean + half, abs=0.02)
    assert bootstrap(values, lambda x: sum(x) / len(x)) == (low, high)  # the same every time


def test_the_interval_fits_the_items():
    assert measured(0.75, [True, 1, 0.0, 1], None) == Measure(0.75, *wilson(3, 4), "wilson")
    found = measured(0.5, [0.25, 0.75, 0.5], None)
    assert found.how == "bootstrap" and 0.25 <= found.low < 0.5 < found.high <= 0.75
    pages = [(-20.0, 5), (-9.0, 3), (-40.0, 9)]  # log likelihoods and words
    perplexity = measured(math.exp(69 / 17), pages, lambda x: math.exp(-sum(a for a, _ in x) / sum(b for _, b in x)))
    assert perplexity.how == "bootstrap" and perplexity.low < math.exp(69 / 17) < perplexity.high
    assert measured(0.9, [0.25, 0.75], None) == Measure(0.9)  # no mean of these items
    assert measured(3.0, None, None) == Measure(3.0) == measured(3.0, [3.0], None)
    assert [shown(x) for x in (0.12345, 12.3456, 12345.6, 1e9, math.inf)] == ["0.123", "12.35", "12,345.60", "1e+09",
                                                                               "inf"]


def outcome(task="arc_easy", value=0.5, **settings):
    return Outcome(task, {"acc": Measure(value, 0.25, 0.75, "wilson")}, 20, 1.5, {"limit": None, **settings})


def test_results_are_kept_by_model_task_and_settings(tmp_path):
    store, one = Store(tmp_path), outcome()
    digest, other = "a" * 64, "b" * 64
    store.put(digest, "out/x", one)
    assert store.get(digest, "arc_easy", one.settings) == one
    assert store.get(other, "arc_easy", one.settings) is None and store.get(digest, "piqa", one.settings) is None
    assert store.get(digest, "arc_easy", {"limit": 5}) is None
    infinite = Outcome("wikitext", {"word_perplexity": Measure(math.inf)}, 3, 0.1, {})
    store.put(digest, "out/x", infinite)
    assert store.get(digest, "wikitext", {}) == infinite
    (file,) = (tmp_path / "results").glob("arc_easy-*.json")
    good = file.read_text()
    for damaged in (good[:-20], good.replace('"items": 20', '"items": -1'), good.replace('"acc"', '"acc": 1, "b"')):
        file.write_text(damaged)
        with pytest.raises(RecipeError, match="is damaged .*; remove it, and its task runs again"):
            store.get(digest, "arc_easy", one.settings)
    assert Store(None).get(digest, "arc_easy", one.settings) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="--out: .* cannot be written"):
        Store(tmp_path / "file").put(digest, "x", one)


def test_the_digest_is_of_what_decides_a_models_words(tmp_path):
    export(tmp_path / "one", recipe("G"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("Another card.")
    assert model_digest(tmp_path / "one") == model_digest(tmp_path / "two")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        with (tmp_path / name / name).open("ab") as file:
            file.write(b" ")
        assert model_digest(tmp_path / name) != model_digest(tmp_path / "one"), name


def test_the_papers_table():
    """Its averages are those published, which a wrong digit or column would change."""
    text = paper.table({})
    for name, average in (("GDN (paper)", "42.54"), ("HOLA + recency (paper)", "43.17"), ("HOLA (paper)", "42.84")):
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        assert line.split("|")[10].strip() == average
    ours = paper.row({"arc_challenge": {"acc": Measure(0.2), "acc_norm": Measure(0.25)},
                      "wikitext": {"word_perplexity": Measure(24.5)}})
    assert ours == {"ARCc": 25.0, "Wiki ppl": 24.5}
    found = markdown({"out/a": [outcome(value=0.5)], "out/b": [outcome(value=0.25)]}, suite="paper")
    assert "| arc_easy | acc | 20 | 0.500 [0.250, 0.750] | 0.250 [0.250, 0.750] |" in found
    assert "| out/b | - | - | 25.00 | - |" in found and "| HOLA (paper) | 22.92 |" in found
    assert set(paper.TASKS) == {task for task, _, _ in paper.COLUMNS.values()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    for seed, name in enumerate(("one", "two")):
        export(folder / name, recipe("HG"), seed=seed)
    for task in ("piqa", "winogrande", "lambada_openai"):
        write(folder / "data", f"{task}.jsonl", hub()[task])
    return folder


@needs_harness
def test_a_stopped_command_goes_on(place, tmp_path, capsys):
    """Two models; the second command runs what the first has not."""
    common = ["--data", str(place / "data"), "--out", str(tmp_path / "out"), "--window", "128", "--device", "cpu"]
    done = run_tool("evaluate", [str(place / "one"), "--tasks", "piqa", *common], capsys)
    assert done.code == 0 and "1/1 piqa: acc 0." in done.output and "from an earlier run" not in done.output
    both = [str(place / "one"), str(place / "two"), "--tasks", "piqa,lambada_openai", *common]
    numbers = tmp_path / "numbers.json"
    done = run_tool("evaluate", [*both, "--json", str(numbers)], capsys)
    assert done.code == 0 and done.output.count("from an earlier run") == 1, done.output
    assert f"| task | metric | items | {place / 'one'} | {place / 'two'} |" in done.output
    kept = json.loads(numbers.read_text())
    one, two = (kept[str(place / name)]["tasks"]["lambada_openai"]["perplexity"] for name in ("one", "two"))
    assert one["how"] == "bootstrap" and one["low"] < one["value"] < one["high"] and one["value"] != two["value"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["models"][str(place / "one")][1]["metrics"]["perplexity"] == one
    assert "--tasks piqa,lambada_openai" in report["command"] and report["versions"]["lm_eval"]
    assert "| lambada_openai | perplexity | 10 |" in (tmp_path / "out" / "report.md").read_text()
    again = run_tool("evaluate", both, capsys)
    assert again.output.count("from an earlier run") == 4
    less = run_tool("evaluate", [*both, "--limit", "5"], capsys)
    assert "from an earlier run" not in less.output and "| piqa | acc | 5 |" in less.output


@needs_harness
@pytest.mark.distributed
@pytest.mark.long
def test_two_processes_share_the_items(place, tmp_path, capsys):
    def command(out, json_file):
        return ["tools/evaluate.py", str(place / "one"), "--tasks", "piqa,winogrande,lambada_openai", "--data",
                str(place / "data"), "--out", str(out), "--window", "128", "--batch", "3", "--json", str(json_file),
                "--device", "cpu"]

    shared = run_program(command(tmp_path / "two", tmp_path / "two.json"), tmp_path / "log", ranks=2)
    assert shared.code == 0 and shared.output.count("| piqa | acc | 10 |") == 1, shared.output
    alone = run_tool("evaluate", command(tmp_path / "one", tmp_path / "one.json")[1:], capsys)
    assert alone.code == 0 and (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()

def test_several_processes_share_tasks_of_exports_only(tmp_path, capsys, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    refused = run_tool("evaluate", [str(tmp_path), "--bundled", "valid"], capsys)
    assert refused.code == 2 and "2 processes share tasks only" in refused.output
    assert "is no exported folder, which several processes need" in refused.output


def test_wrong_options_are_one_line_each(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for options, said in ((["--suite", "paper", "--tasks", "piqa"], "--tasks: give --tasks or --suite"),
                          (["--bundled", "valid", "--out", str(tmp_path)], "--out: applies to --tasks, --suite"),
                          (["--tasks", "piqa", "--out", str(tmp_path / "file")], "is a file; give the name of a"),
                          ([str(place / "one"), "--tasks", "piqa"], "PATH: a model is named twice")):
        done = run_tool("evaluate", [str(place / "one"), *options], capsys)
        assert done.code == 2 and said in done.output and "Traceback" not in done.output, done.output


@needs_harness
def test_the_suite_names_every_set_that_is_missing(place, capsys):
    done = run_tool("evaluate", [str(place / "one"), "--suite", "paper", "--data", str(place / "data")], capsys)
    assert done.code == 3 and done.output.count("DataError: --data: ") == 10
    assert "(--tasks lambada_openai,piqa,winogrande: these are there)" in done.output
