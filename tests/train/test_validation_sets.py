"""Several validation sets by name: each is measured as if it were alone, and found wherever one is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import metric_rows, run_main, run_ranks, small_recipe

from hola_megatron.hf.convert import to_hf


def recipe_in(folder: Path, data: Path, valid: object, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return small_recipe(folder / "recipe.yaml", data / "train", run_dir=str(folder / "run"), **{
        "data__valid": valid, "train__steps": 4, "valid": {"every": 2, "samples": 6}, **changes})


def losses(folder: Path, kind: str) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in metric_rows(folder / "run", kind)]


@pytest.fixture(scope="module")
def both(tmp_path_factory, text_data) -> Path:
    from hola_megatron.config import load_recipe
    from hola_megatron.train.loop import train

    folder = tmp_path_factory.mktemp("both")
    sets = {"own-text": str(text_data / "train"), "other.text": str(text_data / "valid")}
    train(load_recipe(recipe_in(folder, text_data, sets, log__tensorboard=True)))
    return folder


def test_each_set_is_measured_as_if_it_were_alone(both, text_data, tmp_path, capsys):
    for name, part in (("own-text", "train"), ("other.text", "valid")):
        done = run_main([str(recipe_in(tmp_path / part, text_data, str(text_data / part)))], capsys)
        assert done.code == 0 and "valid | step 2 | loss" in done.output
        assert losses(tmp_path / part, "valid") == losses(both, f"valid/{name}") != []
    assert losses(both, "valid") == []


def test_the_sets_are_in_tensorboard_the_picture_and_the_model_card(both, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(both / "run/tensorboard"))
    board.Reload()
    assert {"valid/own-text/loss", "valid/other.text/loss"} <= set(board.Tags()["scalars"])
    card = (to_hf(both / "run", tmp_path / "hf") / "README.md").read_text()
    for name in ("own-text", "other.text"):
        assert f"* validation loss of {name} at step 4: {losses(both, f'valid/{name}')[-1][1]:.4f} nats a token" in card
    assert (both / "run/loss.png").stat().st_size > 0


@pytest.mark.distributed
def test_two_ranks_measure_the_same(both, text_data, tmp_path):
    sets = {"own-text": str(text_data / "train"), "other.text": str(text_data / "valid")}
    done = run_ranks([str(recipe_in(tmp_path / "two", text_data, sets))], tmp_path / "log.txt", ranks=2)
    assert done.code == 0 and "valid | own-text | step 4 | loss " in done.output, done.output[-3000:]
    for name in sets:
        assert losses(tmp_path / "two", f"valid/{name}") == [
            (step, pytest.approx(loss, rel=1e-5)) for step, loss in losses(both, f"valid/{name}")]


def test_another_set_may_be_added_when_a_run_resumes(text_data, tmp_path, capsys):
    recipe = recipe_in(tmp_path / "one", text_data, {"a": str(text_data / "valid")})
    assert run_main([str(recipe)], capsys).code == 0
    recipe = recipe_in(tmp_path / "one", text_data, {"a": str(text_data / "valid"), "b": str(text_data / "train")})
    done = run_main([str(recipe), "train.steps=6"], capsys)
    assert done.code == 0 and "changed | data.valid.b: None -> " in done.output, done.output
    assert [step for step, _ in losses(tmp_path / "one", "valid/a")] == [2, 4, 6]
    assert [step for step, _ in losses(tmp_path / "one", "valid/b")] == [6]


@pytest.mark.parametrize(("valid", "said"), [
    ({}, "data.valid: {} names no validation set; give a folder, several by name"),
    ([], "data.valid: [] is not allowed; give a folder, several by name"), (3, "data.valid: 3 is not allowed"),
    ({"a/b": "x"}, "data.valid.a/b: is no name of a validation set"), ({"": "x"}, "is no name of a validation set"),
    ({"a": 7}, "data.valid.a: 7 is not allowed; give a folder"),
    ({"a": {"b": "c"}}, "data.valid.a: {'b': 'c'} is not allowed")])
def test_wrong_sets_are_one_line(valid, said, text_data, tmp_path, capsys):
    done = run_main([str(recipe_in(tmp_path / "bad", text_data, valid))], capsys)
    assert done.code == 2 and said in done.output and len(done.output.strip().splitlines()) == 1, done.output


def test_a_set_that_is_not_there(text_data, tmp_path, capsys):
    done = run_main([str(recipe_in(tmp_path / "bad", text_data, {"a": str(text_data / "valid"),
                                                                "b": str(tmp_path / "none")}))], capsys)
    assert done.code == 3 and f"{tmp_path / 'none'}: no such data folder" in done.output
