"""A kind that the project does not have, added by one folder (tests/layers/toy) and one line.

It is counted and planned, trains at tensor and pipeline layouts as on one process, resumes, and is refused where it
says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed.layout_rows import PLAIN, PP, SP, TP, Row, finished, run_rows, said
from distributed.same_run import assert_same_steps, assert_same_tensors
from helpers import checkpoint_tensors, run_tool, write_recipe

from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError
from hola_megatron.layers.registry import KINDS
from hola_megatron.plan.estimate import Machine, make_plan
from hola_megatron.plan.parameters import parameters_by_part
from hola_megatron.plan.report import report
from hola_megatron.startup.start import start
from layers.toy import TOY, register

PATTERN = "toy, hola, toy, attention"


@pytest.fixture(autouse=True)
def registered():
    register()
    yield
    del KINDS[TOY.name]


STEPS, LAST = 4, "checkpoints/step_00000004"
ROWS = {
    "one": Row(1, PLAIN),
    "again": Row(1, PLAIN),
    "tp2": Row(2, TP),
    "tp2_sp": Row(2, SP),
    "pp2": Row(2, PP),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_data) -> Path:
    """The folder of all runs; `again` goes on from the middle of `one`."""
    folder = tmp_path_factory.mktemp("toy")
    how = {"model__pattern": PATTERN, "train__steps": STEPS, "checkpoint": {"every": 2, "keep": 9}}
    run_rows({name: row for name, row in ROWS.items() if name != "again"}, folder, text_data, register, **how)
    shutil.copytree(finished(folder, "one", ROWS["one"]), folder / "again")
    shutil.rmtree(folder / "again" / LAST)
    shutil.move(folder / "log1_0", folder / "log_of_one")
    run_rows({"again": ROWS["again"]}, folder, text_data, register, **how)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2", "tp2_sp", "pp2"])
def test_layouts_equal_one_process(name, runs):
    run, one = finished(runs, name, ROWS[name]), runs / "one"
    assert_same_steps(run, one, STEPS)
    assert_same_tensors(run / LAST, one / LAST, ("weight", "exp_avg", "exp_avg_sq"))


def test_it_resumes_bit_for_bit(runs):
    run = finished(runs, "again", ROWS["again"])
    assert "resuming at step 2" in said(runs, "again", ROWS["again"])
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        want, have = (checkpoint_tensors(path / LAST, kind) for path in (runs / "one", run))
        assert have.keys() == want.keys() and all(have[name].equal(tensor) for name, tensor in want.items())


def test_it_is_counted_and_planned(text_data, tmp_path):
    from hola_megatron.model.build import build_model, count_parameters

    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", text_data / "train", model__pattern=PATTERN))
    start(recipe)
    import torch

    built = count_parameters(build_model(recipe, device=torch.device("meta")))
    assert {part: size for part, size in parameters_by_part(recipe.model).items() if size} == built
    assert "2toy" in report(make_plan(recipe, Machine(1, 80.0, 989e12, 0.4)))


def test_it_is_exported_with_equal_logits_and_decodes(runs, tmp_path, capsys):
    """The tool compares Megatron's logits with the exported model's, whole and token by token; then the folder's own
    code is loaded as a user of transformers does, in a process that does not know the kind."""
    done = run_tool("convert", ["to-hf", str(runs / "one"), str(tmp_path / "out")], capsys)
    assert done.code == 0 and "greedy tokens equal 160 of 160" in done.output, done.output
    program = ("import sys, torch; from transformers import AutoModelForCausalLM\n"
               "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
               "x = torch.arange(20)[None]; print(m.generate(x, max_new_tokens=4, do_sample=False).shape, "
               "m.config.layer_kinds)")
    loaded = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True,
                            timeout=300, check=False, env={**os.environ, "HF_HOME": str(tmp_path / "home")})
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert "torch.Size([1, 24]) ('toy', 'hola', 'toy', 'attention')" in loaded.stdout


def test_its_refusals_are_heard(text_data, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", text_data / "train", model__pattern=PATTERN)
    with pytest.raises(RecipeError, match="toy layers are not cut over ranks"):
        load_recipe(path, ["parallel.context=2"])
