"""The DeepSpeed engine: gradients as Megatron's in bf16, refused updates, what it cannot do.

Its layouts are rows of test_layouts.py, its checkpoints of test_resume.py.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from distributed.forked import run_on_ranks
from helpers import MICRO, checkpoint_tensors, metric_rows, run_main, run_ranks, write_recipe
from train.faults import install_named

from hola_megatron.config import build_recipe
from hola_megatron.errors import RecipeError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

KINDS = ("weight", "exp_avg", "exp_avg_sq")
needs_it = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

def train(folder: Path, data: Path, ranks: int, parallel: dict, before=None, **changes) -> Path:
    """Six steps of the micro recipe; the run folder."""
    changes = {"engine": "deepspeed", "train__steps": 6, **changes}
    recipe = write_recipe(folder / "recipe.yaml", data / "train", parallel=parallel, run_dir=str(folder / "run"),
                          **changes)
    done = run_ranks([str(recipe)], folder / "log.txt", ranks=ranks, before=before)
    assert done.code == 0, done.output[-4000:]
    return folder / "run"


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
    from hola_megatron.engine.build import build_engine
    from hola_megatron.startup.start import start, stop

    recipes = [build_recipe(values_of(train={"precision": "bf16"}, parallel=parallel, engine=engine))
               for engine, parallel in (("megatron", {}), ("deepspeed", {"zero_stage": stage}))]
    layout = start(recipes[0])
    moments = []
    for recipe in recipes:
        engine = build_engine(recipe, layout)
        assert engine.train_step(batches_of(rank, 1), 1e-3).updated
        gathered = [(shard.name, shard, engine.state.gather(shard.parameter, 0)) for shard in engine.param_shards()]
        moments.append({name: shard.of(held["exp_avg"]).clone() for name, shard, held in gathered if held})
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
    from hola_megatron.engine.base import not_finite
    from hola_megatron.engine.build import build_engine
    from hola_megatron.startup.start import start, stop

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
    said = (tmp_path / "log.txt").read_text()
    assert f"torch AdamW under DeepSpeed {importlib.metadata.version('deepspeed')}, ZeRO" in said
    assert said.count("DeepSpeed") == 1, said  # the banner's, and nothing of its own
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
    from hola_megatron.profile.profiler import ProfileOptions, profile_recipe

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


def measure_update(rank: int, ranks: int, folder: Path, stage: int) -> None:
    """Bytes of all tensors but the batch when the update begins, beside those that the plan counts."""
    from hola_megatron.engine.build import build_engine
    from hola_megatron.plan.memory import _standing_of_zero
    from hola_megatron.plan.parameters import rank_parameters
    from hola_megatron.startup.start import start, stop

    recipe = build_recipe(values_of(train={"precision": "bf16"}, parallel={"zero_stage": stage}))
    layout, batches, seen = start(recipe), batches_of(rank, 1), []
    before = tensor_bytes()
    engine = build_engine(recipe, layout)
    update = engine._zero.step
    engine._zero.step = lambda: (seen.append(tensor_bytes() - before), update())
    assert engine.train_step(batches, 1e-3).updated
    planned = _standing_of_zero(recipe, ranks, 0)
    if stage == 2:  # the buckets are of the backward pass
        planned["gradients"] -= 2 * 4 * rank_parameters(recipe, 0).total
    expected = planned["weights"] + planned["gradients"] + planned["optimizer"]
    # random-number states and a flag of every parameter are not counted
    assert expected <= seen[0] <= 1.02 * expected + 20_000, (seen, planned)
    stop()


def tensor_bytes() -> int:
    """Of the storages of all tensors and gradients, each once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@needs_it
@pytest.mark.parametrize("stage", [1, 2])
def test_its_memory_is_planned(stage, tmp_path):
    run_on_ranks(measure_update, 2, tmp_path, stage)


def test_without_the_package_one_line_names_the_extra(text_data, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "deepspeed" else find(name, *of))
    recipe = write_recipe(tmp_path / "r.yaml", text_data / "train", engine="deepspeed", run_dir=str(tmp_path / "run"))
    done = run_main([str(recipe)], capsys)
    assert done.code == 2 and "pip install -e '.[deepspeed]'" in done.output and "Traceback" not in done.output
    assert len(done.output.splitlines()) == 1 and not (tmp_path / "run").exists()
