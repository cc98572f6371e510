"""tools/plot.py: curves over tokens, hours and steps, seeds together, and the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_main, run_tool, small_recipe

from hola_megatron.log.curves import group, read_run, table


def write_run(folder: Path, losses: list[float], *, seed: int = 1, name: str = "run", lr: float = 1.0, every: int = 10,
              valid: dict[str, float] | None = None, before: int = 0) -> Path:
    """As a run writes it: 1,000 tokens a step, 3.6 s a step."""
    folder.mkdir(parents=True)
    rows = [{"step": every * n, "kind": "train", "loss": loss, "tokens": before + 1000 * every * n,
             "tokens_per_second": 1000 / 3.6} for n, loss in enumerate(losses, 1)]
    rows += [{"step": 15, "kind": kind, "loss": loss} for kind, loss in (valid or {}).items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(json.dumps({"name": name, "run_dir": str(folder),
                                                    "train": {"seed": seed, "learning_rate": lr}}))
    return folder


def test_places_by_tokens_hours_and_steps(tmp_path):
    run = read_run(write_run(tmp_path / "a", [3.0, 2.0], valid={"valid": 2.5}))
    assert [run.place(step, "steps") for step in (10, 15)] == [10, 15]
    assert [run.place(step, "tokens") for step in (10, 15, 20)] == [10_000, 15_000, 20_000]
    assert [run.place(step, "hours") for step in (5, 10, 15, 20)] == pytest.approx([0.005, 0.01, 0.015, 0.02])


def test_tokens_of_an_earlier_run_take_no_hours(tmp_path):
    run = read_run(write_run(tmp_path / "a", [3.0, 2.0, 1.0], before=10**6))
    assert run.hours == pytest.approx({10: 0.01, 20: 0.02, 30: 0.03}) and run.tokens[10] == 1_010_000


def test_seeds_are_one_curve_with_their_range(tmp_path):
    folders = [write_run(tmp_path / f"hola-{seed}", [3.0 + seed, 2.0 + seed], seed=seed, name=f"hola-seed{seed}")
               for seed in (1, 2, 3)]
    folders.append(write_run(tmp_path / "other", [5.0], name="other", lr=0.5))
    groups = group([read_run(folder) for folder in folders])
    assert [(found.label, len(found.runs)) for found in groups] == [("hola (3 seeds)", 3), ("other", 1)]
    assert groups[0].curve("train", "steps", 1) == [(10, 5, 4, 6), (20, 4, 3, 5)]
    assert groups[0].curve("train", "tokens", 2) == [(10_000, 5, 4, 6), (20_000, 4.5, 3.5, 5.5)]
    same = [write_run(tmp_path / f"same{seed}", [1.0], seed=seed, name="hola_46m", lr=9.0) for seed in (1, 2)]
    assert [found.label for found in group([read_run(folder) for folder in same])] == ["hola_46m (2 seeds)"]
    assert [found.label for found in group([read_run(f) for f in folders], each=True)] == [
        "hola-seed1", "hola-seed2", "hola-seed3", "other"]
    assert len(group([read_run(f) for f in folders], each=True)) == 4


def test_the_table(tmp_path):
    one = write_run(tmp_path / "a", [3.0, 2.0], name="a", valid={"valid/web": 2.5, "valid/code": 1.5})
    two = [write_run(tmp_path / f"b{seed}", [4.0, 2.0 + seed], seed=seed, name=f"b-s{seed}", lr=2.0,
                     valid={"valid": 2.25}) for seed in (1, 2)]
    lines = table(group([read_run(folder) for folder in (one, *two)])).splitlines()
    assert lines[0] == ("| run | steps | tokens | hours in steps | tokens/s | training loss | validation loss | "
                        "validation loss of code | validation loss of web |")
    assert lines[2] == "| a | 20 | 20,000 | 0.02 | 278 | 2.0000 | - | 1.5000 | 2.5000 |"
    assert lines[3] == "| b (2 seeds) | 20 | 20,000 | 0.02 | 278 | 3.5000 (3.0000 to 4.0000) | 2.2500 | - | - |"


@pytest.mark.parametrize("by", ["tokens", "hours", "steps"])
def test_real_runs_are_drawn(by, text_data, tmp_path, capsys):
    for seed in (1, 2):
        recipe = small_recipe(tmp_path / "r.yaml", text_data / "train", run_dir=str(tmp_path / f"s{seed}"),
                              train__steps=4, train__seed=seed, train__global_batch_size=2, name=f"tiny-{seed}",
                              data__valid={"web": str(text_data / "valid")}, valid={"every": 2, "samples": 4})
        assert run_main([str(recipe)], capsys).code == 0
    words = [str(tmp_path / "s1"), str(tmp_path / "s2"), "--by", by, "--out", str(tmp_path / "found.svg")]
    done = run_tool("plot", [*words, "--smooth", "2"], capsys)
    assert done.code == 0 and "| tiny (2 seeds) | 4 | 512 |" in done.output, done.output
    picture = (tmp_path / "found.svg").read_text()
    for said in ("training loss", "validation loss", "tiny (2 seeds), web", "hours in training steps" if by == "hours"
                 else by):
        assert f"<!-- {said} -->" in picture, said
    assert 'id="FillBetweenPolyCollection_1"' in picture  # the range of the seeds
    assert run_tool("plot", [*words[:2], "--out", str(tmp_path / "found.png")], capsys).code == 0
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"


def test_wrong_words_are_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "a", [3.0])
    (tmp_path / "empty").mkdir()
    broken = write_run(tmp_path / "broken", [3.0])
    (broken / "recipe.yaml").write_text("{")
    out = ["--out", str(tmp_path / "x.png")]
    for words, said in (([str(tmp_path / "none"), *out], "no such run folder; give the folders of runs"),
                        ([str(tmp_path / "empty"), *out], "no loss in its metrics.jsonl"),
                        ([str(broken), *out], "recipe.yaml: not valid YAML"),
                        ([str(run), "--out", str(tmp_path / "x.gif")], "must end with .png, .svg, .pdf"),
                        ([str(run), "--out", str(tmp_path / "no/x.png")], "there is no folder"),
                        ([str(run), "--by", "days", *out], "--by: invalid choice"),
                        ([str(run), "--smooth", "0", *out], "--smooth: 0 must be at least 1"), (out, "RUN")):
        done = run_tool("plot", words, capsys)
        assert done.code == 2 and said in done.output and len(done.output.strip().splitlines()) == 1, done.output


def test_a_run_without_its_recipe_is_a_curve_of_its_own(tmp_path):
    runs = [write_run(tmp_path / name, [3.0]) for name in ("a", "b")]
    (runs[0] / "recipe.yaml").unlink()
    assert [found.label for found in group([read_run(run) for run in runs])] == ["a", "run"]
