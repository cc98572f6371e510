"""HQLT layers, and gdn layers with a delayed state, in training: every layout as one process, bit for bit after a
restart, exported; refused where not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from distributed.layout_rows import PLAIN, PP, SP, TP, Row, finished, run_rows, said
from distributed.same_run import assert_same_steps, assert_same_tensors
from helpers import checkpoint_tensors, run_tool, write_recipe

from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError
from hola_megatron.layers.hqlt.costs import mean_visible
from hola_megatron.plan.estimate import Machine, make_plan
from hola_megatron.plan.report import report

STEPS, LAST = 4, "checkpoints/step_00000004"
# the mixing whose rows of the projection are two a head, and the state that needs a doubled row
MODEL = {"pattern": "hqlt, gdn, hqlt, hqlt", "state_delay": 9, "hqlt": {
    "blend": "delayed_chunk", "window": 16, "mixing": "scalar", "rope_theta": 100.0}}
ROWS = {"one": Row(1, PLAIN), "again": Row(1, PLAIN), "tp2": Row(2, TP), "tp2_sp": Row(2, SP), "pp2": Row(2, PP)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_data) -> Path:
    """The folder of all runs; `again` goes on from the middle of `one`."""
    folder = tmp_path_factory.mktemp("hqlt")
    how = {f"model__{name}": value for name, value in MODEL.items()}
    how |= {"train__steps": STEPS, "checkpoint": {"every": 2, "keep": 9}}
    run_rows({name: row for name, row in ROWS.items() if name != "again"}, folder, text_data, **how)
    shutil.copytree(finished(folder, "one", ROWS["one"]), folder / "again")
    shutil.rmtree(folder / "again" / LAST)
    shutil.move(folder / "log1_0", folder / "log_of_one")
    run_rows({"again": ROWS["again"]}, folder, text_data, **how)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2", "tp2_sp", "pp2"])
def test_layouts_equal_one_process(name, runs):
    run, one = finished(runs, name, ROWS[name]), runs / "one"
    assert_same_steps(run, one, STEPS)
    assert_same_tensors(run / LAST, one / LAST)


def test_it_resumes_bit_for_bit(runs):
    run = finished(runs, "again", ROWS["again"])
    assert "resuming at step 2" in said(runs, "again", ROWS["again"])
    want, have = (checkpoint_tensors(path / LAST) for path in (runs / "one", run))
    assert have.keys() == want.keys() and all(have[name].equal(tensor) for name, tensor in want.items())


def test_it_is_exported_with_equal_logits_and_decodes(runs, tmp_path, capsys):
    """The tool compares Megatron's logits with the exported model's, whole and token by token."""
    done = run_tool("convert", ["to-hf", str(runs / "one"), str(tmp_path / "out")], capsys)
    assert done.code == 0 and "greedy tokens equal" in done.output, done.output


def test_its_refusals_are_heard(text_data, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", text_data / "train", **{f"model__{n}": x for n, x in MODEL.items()})
    for override, problem in (("parallel.context=2", "parallel.context: 2 is not possible with hqlt layers"),
                           ("train.cuda_graph=true", "train.cuda_graph: true is not possible with hqlt layers"),
                           ("model.key_dim=9", "model.key_dim: 9 is odd"),
                           ("model.hqlt.blend=late", "model.hqlt.blend: 'late' is not allowed"),
                           ("model.hqlt.window=0", "model.hqlt.window: 0 is not allowed"),
                           ("model.hqlt.slots=4", "model.hqlt.slots: no such key")):
        with pytest.raises(RecipeError, match=problem):
            load_recipe(path, [override])
    assert "3hqlt" in report(make_plan(load_recipe(path), Machine(1, 80.0, 989e12, 0.4))).replace(" ", "")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("length", [1, 5, 6, 7, 40])
def test_the_mean_of_what_is_seen_is_counted(length, chunked):
    seen = [t % 6 + 1 if chunked else min(t + 1, 6) for t in range(length)]
    assert mean_visible(length, 6, chunked) == pytest.approx(sum(seen) / length)
