"""tools/plan.py as a user meets it: numbers, verdicts, exit codes, suggestions that hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hola_megatron.config import load_recipe
from hola_megatron.model.flops import flops_per_token
from hola_megatron.plan.estimate import Machine, make_plan
from hola_megatron.plan.memory import GB, worst_stage
from hola_megatron.plan.report import report
from hola_megatron.plan.table import GPUS, MEMORY_GB, layout_table
from hola_megatron.recipe.checks import check_recipe

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def plan_of(name: str, gpus: int, memory: float, *overrides: str, peak: float | None = 989.4e12):
    return make_plan(load_recipe(ROOT / "recipes" / f"{name}.yaml", list(overrides)), Machine(gpus, memory, peak, 0.4))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/plan.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=60, check=False)


def test_flops_tokens_and_hours_are_those_of_the_recipe():
    plan = plan_of("hola_340m", 8, 80)
    recipe = plan.recipe
    assert plan.flops_per_token == flops_per_token(recipe.model, 2048)
    assert plan.tokens == 28610 * 256 * 2048
    seconds = plan.tokens * plan.flops_per_token / (0.4 * 989.4e12 * 8)
    assert plan.hours == pytest.approx(seconds / 3600)
    assert plan.checkpoint_bytes == 12 * plan.parameters["total"]
    assert plan_of("hola_340m", 8, 80, peak=None).hours is None


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("memory", MEMORY_GB)
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_has_a_layout_on_the_usual_machines(path, gpus, memory):
    """As it is, or as suggested; hola_tiny's 8 samples a step are too few for 64 GPUs, and that is said."""
    plan = plan_of(path.stem, gpus, memory)
    if path.stem == "hola_tiny" and gpus > 8:
        assert not plan.fits and not plan.suggestions and "8 samples a step" in report(plan)
    else:
        assert plan.fits or plan.suggestions


@pytest.mark.parametrize(("name", "gpus", "memory", "overrides"), [
    ("hola_7b", 8, 80, ["train.micro_batch_size=4"]),
    ("hola_7b", 64, 80, ["train.sequence_length=131072"]), ("hola_340m", 512, 80, []),
    ("hola_13b", 8, 50, []), ("hola_13b", 64, 24, ["train.cuda_graph=true", "train.cuda_graph_documents=200"]),
    ("hola_1b_hybrid", 8, 40, ["train.micro_batch_size=16"])])
def test_suggestions_as_overrides_fit(name, gpus, memory, overrides):
    """Pasted onto the command they make a recipe that is allowed on these GPUs and fits."""
    plan = plan_of(name, gpus, memory, *overrides)
    assert not plan.fits and plan.suggestions
    ranks = []
    for found in plan.suggestions:
        again = load_recipe(ROOT / "recipes" / f"{name}.yaml", [*overrides, *found.overrides])
        assert again == found.recipe and check_recipe(again, world_size=gpus) == []
        assert worst_stage(again, gpus).total <= memory * GB
        ranks.append(again.parallel.model_ranks)
    assert ranks == sorted(ranks)
    assert any(found.recipe.train.recompute == "none" for found in plan.suggestions)


def test_suggestions_take_the_fewest_ranks_that_fit():
    """Every allowed layout of fewer ranks is too large: tried one by one, by hand."""
    plan = plan_of("hola_13b", 64, 30)
    least = plan.suggestions[0].recipe.parallel.model_ranks
    assert least > 1
    for tensor in (1, 2, 4):
        for pipeline in (1, 2, 4, 5):
            if tensor * pipeline < least:
                recipe = load_recipe(ROOT / "recipes/hola_13b.yaml", [
                    f"parallel.tensor={tensor}", f"parallel.sequence={str(tensor > 1).lower()}",
                    f"parallel.pipeline={pipeline}", "train.recompute=full"])
                assert check_recipe(recipe, 64) or worst_stage(recipe, 64).total > 30 * GB


def test_long_sequences_are_offered_context_ranks():
    plan = plan_of("hola_7b", 64, 80, "train.sequence_length=131072")
    assert any(found.recipe.parallel.context > 1 for found in plan.suggestions)
    assert all(found.recipe.parallel.context == 1 for found in plan_of("hola_13b", 8, 40).suggestions)


def test_a_layout_that_does_not_divide_is_told_with_one_that_does():
    plan = plan_of("hola_340m", 12, 80)
    assert plan.memory is None and not plan.fits and "is not a multiple of" in plan.problems[0]
    plan = plan_of("hola_340m", 512, 80)
    assert plan.suggestions[0].overrides[0] == "parallel.tensor=2"


def test_kernels_that_are_not_modelled_are_named():
    plan = plan_of("hola_340m", 8, 80, "model.key_dim=96")
    assert "key_dim 96" in report(plan) and plan.to_dict()["kernels_problem"]
    assert plan_of("hola_340m", 8, 80).to_dict()["kernels_problem"] is None


def test_the_command_and_its_exit_codes(tmp_path):
    fits = run("recipes/hola_7b.yaml", "--gpus", "64", "--memory", "80", "--json", str(tmp_path / "plan.json"))
    assert fits.returncode == 0, fits.stderr
    assert "yes, " in fits.stdout and "of 80 GB" in fits.stdout
    numbers = json.loads((tmp_path / "plan.json").read_text())
    memory = numbers["memory"]
    assert numbers["fits"] and sum(memory["bytes"].values()) == pytest.approx(memory["total_bytes"])
    small = run("recipes/hola_7b.yaml", "--gpus", "8", "--memory", "24", "train.micro_batch_size=1")
    assert small.returncode == 1 and "no, " in small.stdout and "suggest" in small.stdout
    assert run("recipes/hola_7b.yaml", "--gpus", "64").returncode == 2
    wrong = run("recipes/hola_7b.yaml", "--gpus", "0", "--device", "h200", "--mfu", "3", "train.leaning_rate=1")
    assert wrong.returncode == 2 and "--gpus: 0" in wrong.stderr and "--mfu: 3.0" in wrong.stderr
    typo = run("recipes/hola_7b.yaml", "--gpus", "8", "--device", "h200", "train.leaning_rate=1")
    assert typo.returncode == 2 and "did you mean train.learning_rate?" in typo.stderr


def test_hours_come_with_a_device():
    assert "not stated" in run("recipes/hola_340m.yaml", "--gpus", "8", "--memory", "80").stdout
    assert " hours on 8 GPUs at MFU 40 % of 989.4 TFLOP/s" in run(
        "recipes/hola_340m.yaml", "--gpus", "8", "--device", "h200", "--mfu", "0.4").stdout


def test_planning_needs_no_torch():
    code = ("import sys; sys.argv = ['tools/plan.py', 'recipes/hola_7b.yaml', '--gpus', '64', '--memory', '80']; "
            "sys.path.insert(0, 'tools'); import plan; plan.main(); sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr


def test_the_table_of_the_docs_is_what_the_tool_prints():
    text = (ROOT / "docs/plan.md").read_text()
    assert layout_table([load_recipe(path) for path in RECIPES]) in text
