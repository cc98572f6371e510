"""Data that cannot be read, and what is said of a run that ended: good state is saved first, and named rightly."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import checkpoint_tensors, metric_rows, run_main, run_ranks, small_recipe
from train.faults import install_named

from hola_megatron.engine.base import Engine

original_step = Engine.train_step


def damage(folder: Path) -> None:
    """Every sample of every shard, in place."""
    for file in folder.glob("*.mds"):
        data = file.read_bytes()
        file.write_bytes(data[:1000] + bytes(255 - x for x in data[1000:]))


def damage_at(step: int, folder: Path, rank: int = 0) -> None:
    """During the step after so many finished ones, of this process."""
    calls = 0

    def train_step(engine: Engine, *args):
        nonlocal calls
        calls += 1
        if calls == step + 1 and engine.layout.rank == rank:
            damage(folder)
        return original_step(engine, *args)

    Engine.train_step = train_step


@pytest.fixture
def place(tmp_path, text_data, monkeypatch) -> Path:
    for part in ("train", "valid"):
        shutil.copytree(text_data / part, tmp_path / part)
    monkeypatch.setattr(Engine, "train_step", original_step)
    return tmp_path


def recipe_in(place: Path, run: str, **changes) -> Path:
    return small_recipe(place / f"{run}.yaml", place / "train", run_dir=str(place / run), train__steps=8,
                        checkpoint={"every": 100}, **changes)


def mend(place: Path, text_data: Path) -> None:
    for part in ("train", "valid"):
        for file in (text_data / part).glob("*.mds"):
            shutil.copyfile(file, place / part / file.name)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_data_error_saves_first_and_the_same_command_goes_on(ranks, place, text_data):
    done = run_ranks([str(recipe_in(place, "run"))], place / "log.txt", ranks=ranks,
                     before=partial(damage_at, 3, place / "train"))
    assert done.code == 3, done.output[-3000:]
    # the samples of a step are read before the step before it is told of
    steps = [int(path.name[-8:]) for path in (place / "run/checkpoints").iterdir()]
    assert steps in ([4], [5]) and f"step {steps[0]} is saved, start the same command again" in done.output
    assert "Traceback" not in done.output and metric_rows(place / "run")[-1]["step"] == steps[0]
    mend(place, text_data)
    parts = run_ranks([str(recipe_in(place, "run"))], place / "log.txt", ranks=ranks)
    assert parts.code == 0 and f"resuming at step {steps[0]}" in parts.output, parts.output[-3000:]
    assert run_ranks([str(recipe_in(place, "whole"))], place / "log.txt", ranks=ranks).code == 0
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        one, other = (checkpoint_tensors(place / name / "checkpoints/step_00000008", kind) for name in ("run", "whole"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_damaged_validation_shard_is_named_before_the_first_step(place, capsys):
    damage(place / "valid")
    recipe = recipe_in(place, "run", data__valid=str(place / "valid"), valid={"every": 8})
    done = run_main([str(recipe)], capsys)
    assert done.code == 3 and f"DataError: {place / 'valid'}" in done.output and "step 1/8" not in done.output


def test_a_validation_shard_damaged_later_saves_first(place, capsys):
    recipe = recipe_in(place, "run", data__valid=str(place / "valid"), valid={"every": 4})
    damage_at(1, place / "valid")
    done = run_main([str(recipe)], capsys)
    errors = [line for line in done.output.splitlines() if "Error" in line]
    assert done.code == 3 and len(errors) == 1, done.output[-3000:]
    assert f"DataError: {place / 'valid'}" in errors[0] and "step 4 is saved" in errors[0]
    assert (place / "run/checkpoints/step_00000004/manifest.json").exists()


def test_diverged_before_the_first_checkpoint_and_started_again(place, capsys):
    """Nothing was lost, so nothing is to be put back: it begins anew, and says what happened before."""
    recipe = recipe_in(place, "run", train__warmup_steps=0)
    bad = [str(recipe), "train.learning_rate=1e15", "guard.max_skips=1"]
    assert run_main(bad, capsys).code == 4
    again = run_main(bad, capsys)
    assert again.code == 4 and "before | an earlier start of this run met bad numbers" in again.output
    assert "put checkpoints/ back" not in again.output and again.output.count("DivergedError") == 1
    done = run_main([str(recipe)], capsys)
    assert done.code == 0 and "(new run)" in done.output


def test_a_stopped_new_run_says_which_command_goes_on(place, capsys):
    recipe = recipe_in(place, "run")
    for flags, said in (([], "start the same command again to go on"),
                        (["--new"], "start the same command, without --new, again to go on")):
        stopped = run_ranks([str(recipe), *flags], place / "log.txt", ranks=1,
                            before=partial(install_named, "interrupt@2"))
        assert stopped.code == 75 and said in stopped.output, stopped.output[-2000:]
    done = run_main([str(recipe)], capsys)
    assert done.code == 0 and "resuming at step 2" in done.output
