"""Runs with planned phases: exactly the promised tokens of every stream over stops, changed ranks and batch sizes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import checkpoint_tensors, metric_rows, run_main, run_ranks, small_recipe
from train.faults import install_named

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def phases(data: Path) -> list[dict]:
    """18 samples of train and 7 of valid, then 11 of valid; not whole steps of 8."""
    a, b = str(data / "train"), str(data / "valid")
    return [{"streams": [{"path": a, "tokens": 18 * 64}, {"path": b, "tokens": 7 * 64 - 5}]},
            {"streams": [{"path": b, "tokens": 11.0 * 64}]}]


def recipe_in(folder: Path, data: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return small_recipe(folder / "recipe.yaml", data / "train", run_dir=str(folder / "run"), **{
        "data__phases": phases(data), "train__steps": 8, "train__micro_batch_size": 2,
        "checkpoint": {"every": 8, "keep": 9}, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text_data) -> Path:
    from hola_megatron.config import load_recipe
    from hola_megatron.train.loop import train

    folder = tmp_path_factory.mktemp("whole")
    train(load_recipe(recipe_in(folder, text_data)))
    return folder


def counted(run: Path) -> list[tuple[int, int]]:
    return [(row["tokens/train"], row["tokens/valid"]) for row in metric_rows(run)]


def test_the_tokens_of_every_stream(whole):
    """Phase 1 ends in step 4, phase 2 in step 5; then train alone."""
    rows = metric_rows(whole / "run")
    assert counted(whole / "run")[-1] == (64 * (18 + 28), 64 * 18)
    at = {row["samples"]: (row["tokens/train"] // 64, row["tokens/valid"] // 64) for row in rows}
    assert at[32] == (18, 14) and at[40] == (22, 18) and at[48] == (30, 18)
    assert all(row["tokens"] == row["tokens/train"] + row["tokens/valid"] == 64 * row["samples"] for row in rows)
    assert rows[-1]["epochs/valid"] > rows[0]["epochs/valid"] > 0


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6])
def test_a_stop_changes_nothing(step, whole, text_data, tmp_path, capsys):
    recipe = recipe_in(tmp_path / "parts", text_data)
    stopped = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1,
                        before=partial(install_named, f"interrupt@{step}"))
    assert stopped.code == 75, stopped.output[-2000:]
    done = run_main([str(recipe)], capsys)
    assert done.code == 0 and f"resuming at step {step}" in done.output and "changed |" not in done.output
    assert counted(tmp_path / "parts/run") == counted(whole / "run")
    for kind in KINDS:
        want, have = (checkpoint_tensors(folder / "run/checkpoints/step_00000008", kind)
                      for folder in (whole, tmp_path / "parts"))
        assert all(torch.equal(have[name], want[name]) for name in want)


@pytest.mark.distributed
def test_other_ranks_and_batch_sizes_after_a_stop(whole, text_data, tmp_path, capsys):
    recipe = recipe_in(tmp_path / "parts", text_data)
    stopped = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=2, before=partial(install_named, "interrupt@3"))
    assert stopped.code == 75, stopped.output[-2000:]
    done = run_main([str(recipe), "train.micro_batch_size=4"], capsys)
    assert done.code == 0, done.output[-3000:]
    assert counted(tmp_path / "parts/run") == counted(whole / "run")
    for want, have in zip(metric_rows(whole / "run"), metric_rows(tmp_path / "parts/run"), strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5)


def test_the_banner_tells_the_phases(text_data, tmp_path, capsys):
    done = run_main([str(recipe_in(tmp_path / "one", text_data, train__steps=5))], capsys)
    assert done.code == 0, done.output[-3000:]
    assert "phase 1  from sample 0 to 25, tokens: train 1,152, valid 448" in done.output
    assert "phase 2  from sample 25 to 36, tokens: valid 704" in done.output
    assert "mixture  phase 3, from sample 36 of the run: train 100.0% (on from its sample 18)" in done.output


def test_a_phase_that_has_begun_may_not_change(whole, text_data, tmp_path, capsys):
    recipe = recipe_in(tmp_path / "run", text_data)
    stopped = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1, before=partial(install_named, "interrupt@2"))
    assert stopped.code == 75
    changed = phases(text_data)
    changed[0]["streams"][0]["tokens"] = 640
    recipe = recipe_in(tmp_path / "run", text_data, data__phases=changed)
    refused = run_main([str(recipe)], capsys)
    assert refused.code == 2 and "data.phases: was " in refused.output and "--allow-change" in refused.output
    refused = run_main([str(recipe), "--allow-change"], capsys)
    assert refused.code == 2 and "data.phases.0: is another phase than the one in which the run has read 16 samples" \
        in refused.output, refused.output
    changed[0]["streams"][0]["tokens"] = 18 * 64
    changed[1]["streams"][0]["tokens"] = 64
    done = run_main([str(recipe_in(tmp_path / "run", text_data, data__phases=changed)), "--allow-change"], capsys)
    assert done.code == 0, done.output[-3000:]
    assert counted(tmp_path / "run/run")[-1] == (64 * (18 + 38), 64 * 8)


WRONG = [
    ([], "data.phases: [] has no phase"),
    ([{"streams": []}], "data.phases.0.streams: [] is not allowed"),
    ([{"streams": [{"path": "a", "tokens": 1.5}]}], "data.phases.0.streams.0.tokens: 1.5 is no whole number"),
    ([{"streams": [{"path": "a", "tokens": 0}]}], "data.phases.0.streams.0.tokens: 0 is not allowed"),
    ([{"streams": [{"path": "a", "tokens": 64}, {"path": "a", "tokens": 64}]}], "a is there twice; name it once"),
    ([{"streams": [{"path": "a", "tokens": 1e9}]}], "data.phases: 1,000,000,000 tokens together, and train.steps = 8"),
    ([{"streams": [{"path": "a", "token": 64, "tokens": 64}]}], "data.phases.0.streams.0.token: no such key (did you "
                                                                "mean data.phases.0.streams.0.tokens?)"),
    ([{"stream": [], "streams": [{"path": "a", "tokens": 64}]}], "data.phases.0.stream: no such key"),
    ({"streams": []}, "data.phases: {'streams': []} is not allowed; give a list"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_wrong_phases_are_one_line(given, said, text_data, tmp_path, capsys):
    done = run_main([str(recipe_in(tmp_path / "bad", text_data, data__phases=given))], capsys)
    assert done.code == 2 and said in done.output and len(done.output.strip().splitlines()) == 1, done.output


def test_a_phase_whose_data_are_not_there(text_data, tmp_path, capsys):
    given = [{"streams": [{"path": str(tmp_path / "none"), "tokens": 64}]}]
    done = run_main([str(recipe_in(tmp_path / "bad", text_data, data__phases=given))], capsys)
    assert done.code == 3 and f"{tmp_path / 'none'}: no such data folder" in done.output
