"""The DeepSpeed engine against Megatron's: losses, gradient norms, weights, checkpoints both ways, refused updates."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from distributed.forked import run_on_ranks
from helpers import MICRO, checkpoint_tensors, metric_rows, run_main, run_ranks, write_recipe
from train.faults import install_named

from hola_megatron.config import build_recipe
from hola_megatron.errors import RecipeError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

STEPS = 6
LAST = f"checkpoints/step_{STEPS:08d}"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
needs_it = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
LAYOUTS = {
    "dp2_zero1": (2, {"overlap": False}, {"train__recompute": "full"}),
    "tp2": (2, {"tensor": 2}, {}),
    "tp2_sp_dp2_zero2": (4, {"tensor": 2, "sequence": True, "zero_stage": 2}, {}),
    "cp2_zero2": (2, {"context": 2, "zero_stage": 2}, {}),
}


def train(folder: Path, data: Path, ranks: int, parallel: dict, before=None, **changes) -> Path:
    """Six steps of the micro recipe, two micro-batches or more each, with a checkpoint at 3; the run folder."""
    folder.mkdir(exist_ok=True)
    changes = {"engine": "deepspeed", "train__steps": STEPS, "checkpoint": {"every": 3, "keep": 5}, **changes}
    recipe = write_recipe(folder / "recipe.yaml", data / "train", parallel=parallel, run_dir=str(folder / "run"),
                          **changes)
    done = run_ranks([str(recipe)], folder / "log.txt", ranks=ranks, before=before)
    assert done.code == 0, done.output[-4000:]
    return folder / "run"


@pytest.fixture(scope="module")
def megatron(tmp_path_factory, text_data) -> Path:
    return train(tmp_path_factory.mktemp("megatron"), text_data, 1, {"distributed_optimizer": False}, engine="megatron")


@pytest.fixture(scope="module")
def zero2(tmp_path_factory, text_data) -> Path:
    return train(tmp_path_factory.mktemp("zero2"), text_data, 2, {"zero_stage": 2})


def assert_same(run: Path, other: Path, *, weights: float = 1e-4) -> None:
    expected, found = metric_rows(other), metric_rows(run)
    assert len(expected) == len(found) == STEPS
    for want, have in zip(expected, found, strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
        assert (have["loss_tokens"], have["samples"]) == (want["loss_tokens"], want["samples"])
    want, have = (checkpoint_tensors(path / LAST) for path in (other, run))
    assert want.keys() == have.keys()
    for name, tensor in want.items():
        assert float((have[name] - tensor).norm() / tensor.norm().clamp_min(1e-3)) < weights, name


@needs_it
def test_zero_2_equals_megatron_on_one_process(zero2, megatron):
    assert_same(zero2, megatron)


@needs_it
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_megatron_on_one_process(layout, megatron, text_data, tmp_path):
    """Gradients are clipped in every step here (their norm is about 1.2, the limit 1)."""
    ranks, parallel, changes = LAYOUTS[layout]
    assert_same(train(tmp_path, text_data, ranks, parallel, **changes), megatron)
    said = (tmp_path / "log.txt").read_text()
    assert f"torch AdamW under DeepSpeed {importlib.metadata.version('deepspeed')}, ZeRO" in said
    assert said.count("DeepSpeed") == 1, said  # the banner's, and nothing of its own


def bf16(data: Path) -> dict:
    return {"train__precision": "bf16", "data__valid": str(data / "valid"), "valid": {"every": 6, "samples": 6}}


@pytest.fixture(scope="module")
def other(tmp_path_factory, text_data) -> Path:
    """Megatron's engine in bf16."""
    return train(tmp_path_factory.mktemp("bf16"), text_data, 2, {}, engine="megatron", **bf16(text_data))


@needs_it
@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_trains_as_megatrons_and_resumes_bit_for_bit(stage, other, text_data, tmp_path):
    """The model has float32 decay and gates among bf16 weights; the main weights are float32."""
    run = train(tmp_path, text_data, 2, {"zero_stage": stage}, **bf16(text_data))
    want, have = metric_rows(other), metric_rows(run)
    assert have[-1]["loss"] < have[0]["loss"] - 0.3
    for mine, theirs in zip(have, want, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-3)
    assert metric_rows(run, "valid")[0]["loss"] == pytest.approx(metric_rows(other, "valid")[0]["loss"], rel=1e-3)
    whole = {kind: checkpoint_tensors(run / LAST, kind) for kind in KINDS}
    weights = whole["weight"]["model.layers.0.mlp.gate_proj.weight"]
    assert not torch.equal(weights, weights.bfloat16().float())
    assert_goes_on_bit_for_bit(run, whole, tmp_path, text_data, {"zero_stage": stage}, **bf16(text_data))


def assert_goes_on_bit_for_bit(run: Path, whole: dict, folder: Path, data: Path, parallel: dict, **changes) -> None:
    """From the checkpoint of step 3, as after a kill."""
    shutil.rmtree(run / LAST)
    train(folder, data, 2, parallel, **changes)
    assert "resuming at step 3" in (folder / "log.txt").read_text()
    for kind, tensors in whole.items():
        again = checkpoint_tensors(run / LAST, kind)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items()), kind


@needs_it
@pytest.mark.parametrize("way", ["to itself", "to megatron", "from megatron"])
def test_a_checkpoint_goes_on(way, megatron, zero2, text_data, tmp_path):
    """Bit for bit in the same layout, and with equal losses from one engine and layout to the other."""
    source = megatron if way == "from megatron" else zero2
    run = shutil.copytree(source, tmp_path / "run")
    whole = {kind: checkpoint_tensors(run / LAST, kind) for kind in KINDS}
    if way == "to itself":
        return assert_goes_on_bit_for_bit(run, whole, tmp_path, text_data, {"zero_stage": 2})
    shutil.rmtree(run / LAST)
    parallel, changes = ({"tensor": 2}, {"engine": "megatron"}) if way == "to megatron" else ({}, {})
    train(tmp_path, text_data, 2, parallel, **changes)
    assert "resuming at step 3" in (tmp_path / "log.txt").read_text()
    assert_same(run, source)
    for kind, tensors in whole.items():
        again = checkpoint_tensors(run / LAST, kind)
        assert again.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (again[name] - tensor).norm() < 1e-3 * tensor.norm().clamp_min(1e-6), (kind, name)


def values_of(**sections) -> dict:
    values = json.loads(json.dumps(MICRO))
    values["data"]["train"], values["engine"] = "unused", "deepspeed"
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
    return values


def batches_of(rank: int, seed: int) -> list:
    from hola_megatron.data.stream import Batch

    drawn = torch.randint(0, 264, (2, 2, 65), generator=torch.Generator().manual_seed(10 * seed + rank))
    return [Batch(x[:, :-1].contiguous(), x[:, 1:].contiguous(), torch.ones(2, 64), None) for x in drawn]


def same_gradients(rank: int, ranks: int, folder: Path, stage: int) -> None:
    """In bf16 too both engines add up micro-batches and ranks in float32, and float32 parameters lose nothing."""
    from hola_megatron.engine.base import build_engine
    from hola_megatron.parallel.groups import start, stop

    recipes = [build_recipe(values_of(train={"precision": "bf16"}, parallel=parallel, engine=engine))
               for engine, parallel in (("megatron", {}), ("deepspeed", {"zero_stage": stage}))]
    layout = start(recipes[0])
    moments = []
    for recipe in recipes:
        engine = build_engine(recipe, layout)
        assert engine.train_step(batches_of(rank, 1), 1e-3).updated
        gathered = [(piece.name, piece, engine.state.gather(piece.parameter, 0)) for piece in engine.parameter_pieces()]
        moments.append({name: piece.of(held["exp_avg"]).clone() for name, piece, held in gathered if held})
    assert moments[0].keys() == moments[1].keys() and bool(moments[0]) == (rank == 0)
    for name, want in moments[0].items():
        assert want.norm() > 0 and (moments[1][name] - want).norm() < 1e-5 * want.norm(), name
    stop()


@needs_it
@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_gradients_are_megatrons(stage, tmp_path):
    run_on_ranks(same_gradients, 2, tmp_path, stage)


def refuse_once(rank: int, ranks: int, folder: Path, stage: int, precision: str) -> None:
    """One rank's judge refuses a step on all; what follows is what would have been without it."""
    from hola_megatron.checkpoint.save_load import state_hash
    from hola_megatron.engine.base import build_engine, not_finite
    from hola_megatron.parallel.groups import start, stop

    recipe = build_recipe(values_of(train={"precision": precision}, parallel={"zero_stage": stage}))
    layout, batches = start(recipe), functools.partial(batches_of, rank)
    made, plain = build_engine(recipe, layout), build_engine(recipe, layout)
    for engine in (made, plain):
        assert engine.train_step(batches(1), 1e-3).updated
    before = state_hash(made)
    judge = (lambda loss, norm: "no") if rank == 1 else not_finite
    refused = made.train_step(batches(2), 1e-3, judge)
    assert refused.problem == ("no" if rank == 1 else "another rank found bad numbers"), refused
    assert state_hash(made) == before == state_hash(plain)
    model = [p.detach().clone() for p in made.model[0].parameters()]
    assert all(torch.equal(p, q) for p, q in zip(model, plain.model[0].parameters(), strict=True))
    results = [engine.train_step(batches(3), 1e-3) for engine in (made, plain)]
    assert results[0] == results[1] and results[0].updated
    assert state_hash(made) == state_hash(plain) != before
    assert any(not torch.equal(p, q) for p, q in zip(model, made.model[0].parameters(), strict=True))
    assert made.state.step == plain.state.step == 2
    stop()


@needs_it
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16")])
def test_a_refused_update_leaves_no_trace(stage, precision, tmp_path):
    run_on_ranks(refuse_once, 2, tmp_path, stage, precision)


@needs_it
def test_a_bad_gradient_is_skipped_and_its_place_named(text_data, tmp_path):
    """On the second rank of two, in step 4: nothing moves, and step 5 trains on."""
    run = train(tmp_path, text_data, 2, {"zero_stage": 2}, functools.partial(install_named, "nan_gradient@4@1"),
                checkpoint={"every": 1, "keep": 9, "background": False}, log__sample_every=6, log__sample_tokens=4)
    (incident,) = (run / "incidents").iterdir()
    (bad,) = json.loads((incident / "incident.json").read_text())
    assert bad["step"] == 4 and bad["reason"] == "grad_norm nan is not finite"
    assert bad["first_nonfinite"] == "gradient of model.layers.1.mlp.gate_proj.weight"
    for kind in KINDS:
        third, fourth, fifth = (checkpoint_tensors(run / f"checkpoints/step_0000000{n}", kind) for n in (3, 4, 5))
        assert all(torch.equal(third[name], fourth[name]) for name in third)
        assert not all(torch.equal(fourth[name], fifth[name]) for name in third)
    assert len(metric_rows(run, "sample")[0]["text"]) > 4


@needs_it
def test_it_is_profiled_by_part(tmp_path):
    from hola_megatron.monitor.profiler import ProfileOptions, profile_recipe

    recipe = build_recipe(values_of(train={"global_batch_size": 4}))
    numbers = profile_recipe(recipe, ProfileOptions(steps=1, warmup=1))
    assert "DeepSpeed" in numbers["adam"]
    assert {"MLP", "state", "read", "optimizer", "head and loss"} <= numbers["share"].keys()


@pytest.mark.parametrize(("changes", "said"), [
    ({"parallel": {"pipeline": 2}}, "parallel.pipeline: 2 is not possible with engine = deepspeed; set it to 1, or"),
    ({"parallel": {"distributed_optimizer": False}}, "parallel.distributed_optimizer: false is not possible with"),
    ({"parallel": {"zero_stage": 3}}, "parallel.zero_stage: 3 is not possible: the loss uses"),
    ({"parallel": {"zero_stage": 4}}, "parallel.zero_stage: 4 is not allowed; input should be 1, 2 or 3"),
    ({"parallel": {"zero_stage": 2}, "engine": "megatron"}, "parallel.zero_stage: 2 belongs to engine = deepspeed"),
    ({"model": {"moe": {"experts": 4}}}, "model.moe.experts: 4 is not possible with engine = deepspeed; set it to"),
    ({"train": {"optimizer": "muon"}}, "train.optimizer: muon is not possible with engine = deepspeed; set it to"),
    ({"train": {"precision": "bf16"}, "fp8": {"recipe": "current"}}, "fp8.recipe: current is not possible with engine"),
    ({"engine": "zero"}, "engine: 'zero' is not allowed; input should be 'megatron' or 'deepspeed'")])
def test_what_it_cannot_do_is_refused_before_anything_starts(changes, said):
    with pytest.raises(RecipeError) as error:
        build_recipe(values_of(**changes))
    assert any(problem.startswith(said) for problem in error.value.problems), error.value.problems


def test_it_is_not_planned():
    from hola_megatron.plan.memory import worst_stage

    with pytest.raises(RecipeError, match="engine: deepspeed is not planned"):
        worst_stage(build_recipe(values_of()), 8)


def test_without_the_package_one_line_names_the_extra(text_data, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "deepspeed" else find(name, *of))
    recipe = write_recipe(tmp_path / "r.yaml", text_data / "train", engine="deepspeed", run_dir=str(tmp_path / "run"))
    done = run_main([str(recipe)], capsys)
    assert done.code == 2 and "pip install -e '.[deepspeed]'" in done.output and "Traceback" not in done.output
    assert len(done.output.splitlines()) == 1 and not (tmp_path / "run").exists()
