"""Predicted speeds: against every measured run, by the directions that matter, and for every legal recipe."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from helpers import MICRO, examples, run_tool
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hola_megatron.config import build_recipe, load_recipe
from hola_megatron.errors import RecipeError
from hola_megatron.plan.estimate import Machine, make_plan
from hola_megatron.plan.measured import ALLOWED, RUNS, measured_table
from hola_megatron.plan.memory import worst_stage
from hola_megatron.plan.report import report
from hola_megatron.plan.speed import H200_PEAK, estimate_speed

ROOT = Path(__file__).parent.parent.parent
H200 = Machine(4, 141.0, H200_PEAK, bandwidth=4.8e12, device="h200")
TENSOR = ["parallel.tensor=4", "parallel.sequence=true"]

# runs whose speed is not predicted within a tenth, and why
OFF = {("hola_340m", "micro_batch_size=1"): "launching took this host 8.4 ms a layer, another 7 at most",
       ("hola_3b", ""): "launching took this host 12 ms a layer, others 8 to 9 over tensor ranks"}


def recipe_of(name: str, *overrides: str):
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", list(overrides))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.recipe} {run.overrides} {run.gpus}x{run.micro_batches}")
def test_every_measured_run_is_predicted_within_a_tenth_but_those_named(run):
    off = abs(run.predicted / run.tokens_per_second - 1)
    assert (off > ALLOWED) == ((run.recipe, run.overrides) in OFF and not run.load().train.cuda_graph
                               and (run.recipe, run.gpus) in (("hola_340m", 1), ("hola_3b", 4)))


def test_the_table_of_the_docs_is_what_the_tool_prints(capsys):
    done = run_tool("plan", ["--measured"], capsys)
    assert done.code == 0 and done.output.strip() == measured_table()
    assert measured_table() in (ROOT / "docs/plan.md").read_text()


def test_7b_over_four_tensor_ranks_is_not_promised_the_speed_of_whole_models():
    """The plan said 39.7k tokens/s of a layout that makes 15.1k, and that another layout fits, but not that it is
    2.8 times as fast."""
    plan = make_plan(recipe_of("hola_7b", *TENSOR), H200)
    assert plan.speed.launch_bound and 0.1 < plan.mfu < 0.2
    (best,) = plan.suggestions
    assert best.recipe.parallel.tensor == 1 and 2.5 < best.tokens_per_second / plan.tokens_per_second < 3.5
    said = report(plan)
    assert "times as fast" in said and "bound by launching" in said and "train.cuda_graph=true" in said
    assert make_plan(best.recipe, H200).suggestions == [], "nothing is clearly faster than the fastest"


@pytest.mark.parametrize("gpus", [4, 8, 64])
def test_hola_7b_as_it_is_fits_141_gb_and_no_layout_is_clearly_faster(gpus):
    plan = make_plan(recipe_of("hola_7b"), dataclasses.replace(H200, gpus=gpus))
    assert plan.fits and plan.suggestions == []


@pytest.mark.parametrize("overrides", re.findall(
    r"((?:(?:parallel|train)\.\w+=\w+ )+)\(\d+ GB by the plan", (ROOT / "recipes/hola_7b.yaml").read_text())
    or ["the comment names no layout"])
def test_what_hola_7b_names_for_80_gb_fits_it(overrides):
    assert make_plan(recipe_of("hola_7b", *overrides.split()), Machine(8, 80.0, H200_PEAK)).fits


def test_a_suggestion_without_a_device_says_that_its_speed_is_not_known():
    said = report(make_plan(recipe_of("hola_7b", *TENSOR), Machine(4, 141.0, None)))
    assert "also fits" in said and "which is faster is not known" in said


def test_a_given_mfu_is_used_as_it_is():
    plan = make_plan(recipe_of("hola_7b"), dataclasses.replace(H200, mfu=0.3))
    assert plan.mfu == pytest.approx(0.3) and "MFU 30 % of 989.4 TFLOP/s (as given)" in report(plan)


def test_what_no_run_has_shown_is_said():
    for overrides, gpus, device, said in (
            (["parallel.pipeline=2"], 8, "h200", "pipeline ranks"), ([], 64, "h200", "any network between nodes"),
            ([], 4, "h100", "another device than H200"), (["train.recompute=full"], 4, "h200", "recompute"),
            (["model.key_dim=96"], 4, "h200", "layers without Triton kernels"),
            (["model.pattern=HHHW"], 4, "h200", "swa layers"),
            (["model.pattern=HHHA"], 4, "h200", "layers of several kinds"),
            (["model.cache.local=none", "parallel.context=2"], 4, "h200", "not one fused operation"),
            (["fp8.recipe=current"], 4, "h200", "fp8")):
        plan = make_plan(recipe_of("hola_3b", *overrides), dataclasses.replace(H200, gpus=gpus, device=device))
        assert any(said in note for note in plan.unmeasured) and "not measured: " in report(plan), overrides
    assert make_plan(recipe_of("hola_1b"), H200).unmeasured == []


@pytest.mark.parametrize(("slower", "faster"), [
    (["parallel.tensor=4"], ["parallel.tensor=2"]), (["train.micro_batch_size=1"], ["train.micro_batch_size=2"]),
    (["train.recompute=full"], ["train.recompute=none"]), ([], ["train.cuda_graph=true"]),
    (["parallel.tensor=1", "parallel.sequence=false"],
     ["parallel.tensor=1", "parallel.sequence=false", "fp8.recipe=current"])])
def test_directions(slower, faster):
    speeds = [estimate_speed(recipe_of("hola_3b", *overrides), 4, H200_PEAK).tokens_per_second
              for overrides in (slower, faster)]
    assert speeds[0] < speeds[1]


# Every legal recipe can be planned


DIMS = [8, 16, 24, 32, 48, 64, 96, 100, 128, 160, 256, 512]


@st.composite
def recipes(draw) -> dict:
    """Mostly legal ones: sizes that must divide are drawn as multiples."""
    def pick(*choices):
        return draw(st.sampled_from(choices))

    values = copy.deepcopy(MICRO)
    tensor, pipeline, context = pick(1, 1, 2, 4), pick(1, 1, 2, 4), pick(1, 1, 1, 2, 8)
    virtual = pick(1, 2) if pipeline > 1 else 1
    attention_heads, experts = tensor * pick(1, 2, 3), pick(None, None, 2, 8)
    values["model"] |= {
        "layers": pipeline * virtual * pick(1, 2, 3), "pattern": pick("H", "G", "A", "HG", "HHHA", "GA"),
        "hidden_size": max(8, 2 * attention_heads * pick(1, 8, 25, 64)), "attention_heads": attention_heads,
        "heads": tensor * pick(1, 2, 3, 8), "key_dim": pick(*DIMS), "value_dim": pick(*DIMS),
        "conv_width": pick(1, 2, 4, 6), "rule": pick("gdn", "gdn", "delta", "delta", "none"), "beta_range": pick(1, 2),
        "rope_theta": pick(None, 1e4),
        "mlp_hidden_size": tensor * pick(8, 24, 4096), "vocab_size": tensor * pick(2, 66, 8000),
        "tie_embeddings": pick(True, False), "backend": pick("auto", "torch"), "layer_spec": pick("auto", "local"),
        "cache": {"block": pick(1, 7, 16, 256), "slots": pick(1, 4, 100), "score": pick("betae", "recency"),
                  "sink": pick(True, False)}}
    if experts:
        values["model"]["moe"] = {"experts": experts, "top_k": pick(1, 2)}
    muon = not experts and pick(True, False, False)
    values["parallel"] = {
        "tensor": tensor, "sequence": tensor > 1 and (experts is not None or pick(True, False)), "pipeline": pipeline,
        "virtual_pipeline": virtual, "context": context, "expert": pick(1, 2) if experts else 1,
        "distributed_optimizer": not muon and pick(True, False)}
    values["data"]["documents"] = pick("separate", "joined")
    values["train"] |= {
        "sequence_length": pick(4096, 65536) if context * tensor > 1 else pick(1, 2, 63, 64, 4096),
        "global_batch_size": pick(64, 96, 1024), "micro_batch_size": pick(1, 2, 8), "steps": pick(2, 10**6),
        "precision": pick("fp32", "bf16"), "recompute": pick("none", "full"),
        "optimizer": "muon" if muon else "adamw", "logits_budget_gb": pick(None, 1e-6, 2.0),
        "cuda_graph": pipeline == context == 1 and experts is None and pick(True, False)}
    if not experts and values["train"]["precision"] == "bf16" and values["model"]["layer_spec"] == "auto":
        values["fp8"] = {"recipe": pick(None, "current", "delayed")}
    return values


def everything_is_a_number(value: object, path: str = "") -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            everything_is_a_number(inner, f"{path}.{key}")
    elif isinstance(value, float):
        assert math.isfinite(value) and value >= 0, (path, value)


@settings(max_examples=examples(400), deadline=None,
          suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(recipes(), st.sampled_from([1, 2, 4, 16]), st.booleans(), st.sampled_from([None, H200_PEAK]))
def test_every_legal_recipe_can_be_planned(values, copies, divides, peak):
    """A recipe that training accepts gives a plan of finite numbers, whatever its widths and the number of GPUs."""
    try:
        recipe = build_recipe(values)
    except RecipeError:
        assume(False)
    gpus = copies * recipe.parallel.model_ranks * recipe.parallel.expert if divides else copies
    plan = make_plan(recipe, Machine(gpus, 80.0, peak))
    numbers = plan.to_dict()
    everything_is_a_number(numbers)
    json.dumps(numbers, allow_nan=False)
    assert len(report(plan).splitlines()) > 5
    if peak and not plan.problems:
        assert plan.tokens_per_second > 0 and plan.hours > 0


@pytest.mark.parametrize("width", [8, 16, 24, 32, 48, 63, 65, 96, 127, 129, 255, 512])
@pytest.mark.parametrize("field", ["key_dim", "value_dim"])
@pytest.mark.parametrize("pattern", ["H", "G"])
def test_every_head_width_can_be_planned(width, field, pattern):
    recipe = recipe_of("hola_340m", f"model.{field}={width}", f"model.pattern={pattern}")
    assert worst_stage(recipe, 8).total > 0 and make_plan(recipe, dataclasses.replace(H200, gpus=8)).hours > 0
