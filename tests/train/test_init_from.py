"""A new run that starts from another run's checkpoint or from an export: weights, moments, data, added caches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import checkpoint_tensors, metric_rows, run_main, run_ranks, small_recipe

from hola_megatron.checkpoint.folder import open_checkpoint
from hola_megatron.hf.convert import to_hf

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def recipe_in(folder: Path, data: Path, steps: int = 4, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return small_recipe(folder / "recipe.yaml", data / "train", run_dir=str(folder / "run"), train__steps=steps,
                        **{"train__schedule": "constant", "train__warmup_steps": 0,
                           "checkpoint": {"every": 4, "keep": 9}, **changes})


@pytest.fixture(scope="module")
def source(tmp_path_factory, text_data) -> Path:
    """Eight steps of a run, with checkpoints at steps 4 and 8; and the export of step 4."""
    folder = tmp_path_factory.mktemp("source")
    from hola_megatron.config import load_recipe
    from hola_megatron.train.loop import train

    train(load_recipe(recipe_in(folder, text_data, 8)))
    to_hf(folder / "run/checkpoints/step_00000004", folder / "hf")
    return folder


def tensors(folder: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: checkpoint_tensors(folder / f"run/checkpoints/step_{step:08d}", kind) for kind in KINDS}


def same(one: dict, other: dict, kinds=KINDS) -> bool:
    return all(one[kind].keys() == other[kind].keys()
               and all(torch.equal(one[kind][name], other[kind][name]) for name in one[kind]) for kind in kinds)


def test_a_run_that_keeps_everything_is_the_continued_run(source, text_data, tmp_path, capsys):
    four = source / "run/checkpoints/step_00000004"
    recipe = recipe_in(tmp_path / "kept", text_data, init={"from": str(four), "optimizer": "keep"})
    done = run_main([str(recipe)], capsys)
    assert done.code == 0, done.output[-3000:]
    assert f"init | {four}, sha256 " in done.output
    assert "moments of 4 updates | streams go on after 2.05k tokens" in done.output
    assert same(tensors(tmp_path / "kept", 4), tensors(source, 8))
    manifest = open_checkpoint(tmp_path / "kept/run/checkpoints/step_00000004").manifest
    assert manifest["step"] == 4 and manifest["optimizer_step"] == 8
    assert manifest["trainer"]["first_sample"] == 32 and str(four) in manifest["trainer"]["origin"]
    assert [row["tokens"] for row in metric_rows(tmp_path / "kept/run")] == [2560, 3072, 3584, 4096]


def test_fresh_moments_and_data_differ_each_by_itself(source, text_data, tmp_path, capsys):
    four, found = str(source / "run/checkpoints/step_00000004"), {}
    for name, init in {"moments": {"data": "keep"}, "data": {"optimizer": "keep", "data": "fresh"}}.items():
        recipe = recipe_in(tmp_path / name, text_data, init={"from": four, **init})
        assert run_main([str(recipe)], capsys).code == 0
        found[name] = tensors(tmp_path / name, 4)
        assert not same(found[name], tensors(source, 8), ("weight",))
    assert [metric_rows(tmp_path / name / "run")[0]["tokens"] for name in found] == [2560, 512]
    optimizer_steps = [open_checkpoint(tmp_path / name / "run/checkpoints/step_00000004").manifest["optimizer_step"]
                       for name in found]
    assert optimizer_steps == [4, 8]


def test_an_export_gives_what_its_checkpoint_gives(source, text_data, tmp_path, capsys):
    for name, path in (("run", source / "run/checkpoints/step_00000004"), ("hf", source / "hf")):
        recipe = recipe_in(tmp_path / name, text_data, init={"from": str(path)})
        done = run_main([str(recipe)], capsys)
        assert done.code == 0 and "moments of zero | streams go on after 2.05k tokens" in done.output, done.output
    assert same(tensors(tmp_path / "run", 4), tensors(tmp_path / "hf", 4))


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [
    {"parallel__tensor": 2}, {"parallel__pipeline": 2}, pytest.param({"engine": "deepspeed"}, marks=pytest.mark.long),
    pytest.param({"parallel__distributed_optimizer": False}, marks=pytest.mark.long)], ids=str)
def test_a_source_is_read_at_any_layout(layout, source, text_data, tmp_path):
    init = {"from": str(source / "run/checkpoints/step_00000004"), "optimizer": "keep"}
    recipe = recipe_in(tmp_path / "two", text_data, init=init, **layout)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=2)
    assert done.code == 0, done.output[-3000:]
    want, have = tensors(source, 8)["weight"], tensors(tmp_path / "two", 4)["weight"]
    for name in want:
        torch.testing.assert_close(have[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [
    {"train__optimizer": "muon", "parallel__distributed_optimizer": False},
    {"model__moe": {"experts": 4, "balancing": "bias"}}], ids=["muon", "experts"])
def test_other_optimizers_and_experts_are_kept_too(kind, text_data, tmp_path, capsys):
    assert run_main([str(recipe_in(tmp_path / "old", text_data, 8, **kind))], capsys).code == 0
    init = {"from": str(tmp_path / "old/run/checkpoints/step_00000004"), "optimizer": "keep"}
    done = run_main([str(recipe_in(tmp_path / "new", text_data, init=init, **kind))], capsys)
    assert done.code == 0, done.output[-3000:]
    assert same(tensors(tmp_path / "new", 4), tensors(tmp_path / "old", 8))


def test_moments_of_another_optimizer_are_refused(source, text_data, tmp_path, capsys):
    init = {"from": str(source / "run"), "optimizer": "keep"}
    done = run_main([str(recipe_in(tmp_path / "new", text_data, init=init, train__optimizer="muon",
                                   parallel__distributed_optimizer=False))], capsys)
    assert done.code == 2 and "it was saved by another optimizer than muon" in done.output, done.output
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize("optimizer", ["fresh", "keep"])
def test_a_cache_is_added_to_a_gated_deltanet(optimizer, text_data, tmp_path, capsys):
    assert run_main([str(recipe_in(tmp_path / "gdn", text_data, model__pattern="GA"))], capsys).code == 0
    init = {"from": str(tmp_path / "gdn/run"), "optimizer": optimizer}
    # a rate so low that one update leaves float32 weights as they are
    recipe = recipe_in(tmp_path / "hola", text_data, 1, model__pattern="HA", model__cache={
        "block": 16, "slots": 4, "gate_init": -3.0}, train__learning_rate=1e-30, init=init)
    done = run_main([str(recipe)], capsys)
    assert done.code == 0, done.output[-3000:]
    mixer = "model.layers.0.mixer"
    assert f"init | not there, drawn as for a new model | {mixer}.gamma_k, {mixer}.gamma_q, {mixer}.gate, " \
        f"{mixer}.sink\n" in done.output
    assert "init | model.pattern: GA -> HA" in done.output
    before = checkpoint_tensors(tmp_path / "gdn/run/checkpoints/step_00000004")
    after = checkpoint_tensors(tmp_path / "hola/run/checkpoints/step_00000001")
    assert after.keys() - before.keys() == {f"{mixer}.{name}" for name in ("gamma_q", "gamma_k", "gate", "sink")}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (after[f"{mixer}.gate"] == -3).all() and (after[f"{mixer}.gamma_q"] == 1).all()
    moment = checkpoint_tensors(tmp_path / "hola/run/checkpoints/step_00000001", "exp_avg")
    assert moment.keys() == after.keys()


def test_a_merge_and_a_router_are_added_with_the_cache(text_data, tmp_path, capsys):
    assert run_main([str(recipe_in(tmp_path / "gdn", text_data, model__pattern="GA"))], capsys).code == 0
    recipe = recipe_in(tmp_path / "hola", text_data, 1, model__pattern="HA", model__cache={
        "block": 16, "slots": 4, "merge": "two", "score": "learned", "router_width": 3},
        init={"from": str(tmp_path / "gdn/run")})
    done = run_main([str(recipe)], capsys)
    assert done.code == 0, done.output[-3000:]
    after = checkpoint_tensors(tmp_path / "hola/run/checkpoints/step_00000001")
    before = checkpoint_tensors(tmp_path / "gdn/run/checkpoints/step_00000004")
    new = {"gamma_q", "gamma_k", "sink", "mix_proj.weight", "route_proj.weight", "route_out", "route_bias"}
    assert after.keys() - before.keys() == {f"model.layers.0.mixer.{name}" for name in new}


def test_long_context_by_one_command(source, text_data, tmp_path, capsys):
    """Samples of 64 tokens become samples of 1,024, in a new run of the old one's weights, without a new dataset."""
    recipe = recipe_in(tmp_path / "long", text_data, data__valid=str(text_data / "valid"), valid={"every": 2,
                       "samples": 4}, train__global_batch_size=2, train__micro_batch_size=1)
    words = [str(recipe), f"init.from={source / 'run'}", "train.sequence_length=1024"]
    done = run_main([*words, "train.steps=3"], capsys)
    assert done.code == 0, done.output[-3000:]
    assert "samples of 64 tokens are cut anew to 1,024" in done.output
    assert "1 micro-batches" not in done.output and "of 1 x 1024 tokens" in done.output
    assert [row["loss_tokens"] for row in metric_rows(tmp_path / "long/run")] == pytest.approx([2048] * 3, rel=0.1)
    assert metric_rows(tmp_path / "long/run", "valid")[0]["tokens"] == pytest.approx(4096, rel=0.1)
    # what the earlier run read in shorter samples counts on, and a restart changes nothing
    assert [row["tokens"] for row in metric_rows(tmp_path / "long/run")] == [4096 + 2048 * n for n in (1, 2, 3)]
    one = run_main([*words, "train.steps=4", f"run_dir={tmp_path / 'one'}"], capsys)
    assert one.code == 0 and run_main([*words, "train.steps=4"], capsys).code == 0
    assert [row["loss"] for row in metric_rows(tmp_path / "one")] \
        == [row["loss"] for row in metric_rows(tmp_path / "long/run")]


def test_a_resumed_run_needs_its_source_no_more(source, text_data, tmp_path, capsys):
    shutil.copytree(source / "run", tmp_path / "old")
    recipe = recipe_in(tmp_path / "new", text_data, init={"from": str(tmp_path / "old")})
    assert run_main([str(recipe)], capsys).code == 0
    shutil.rmtree(tmp_path / "old")
    done = run_main([str(recipe), "train.steps=6"], capsys)
    assert done.code == 0 and "resuming at step 4" in done.output and "init |" not in done.output, done.output
    refused = run_main([str(recipe), "train.steps=8", "init.optimizer=keep"], capsys)
    assert refused.code == 2 and "init.optimizer: was 'fresh' when" in refused.output


WRONG = {
    "nowhere": ({"from": "{tmp}/none"}, {}, "init.from: {tmp}/none: no such folder; give a run folder"),
    "no run": ({"from": "{tmp}"}, {}, "no checkpoint here (looked for step_NNNNNNNN folders)"),
    "a url": ({"from": "s3://bucket/run"}, {}, "init.from: s3://bucket/run is a URL"),
    "own": ({"from": "{tmp}/new/run"}, {}, "is this run's own folder"),
    "no source": ({"optimizer": "keep"}, {}, "init.optimizer: keep, and init.from names no run"),
    "no moments": ({"from": "{source}/hf", "optimizer": "keep"}, {}, "has weights without moments; set it to fresh"),
    "narrower": ({"from": "{source}/run"}, {"model__mlp_hidden_size": 32}, "is of another model: model.layers.0.mlp."),
    "shallower": ({"from": "{source}/run"}, {"model__layers": 1, "model__pattern": "H"},
                  "is there, and the recipe's model has no such tensor"),
    "without cache": ({"from": "{source}/run"}, {"model__pattern": "GA"}, "gamma_k is there, and the recipe's model"),
    "other kind": ({"from": "{source}/run"}, {"model__pattern": "HH"}, "model.layers.1.mixer."),
    "two names": ({"from": "a", "source": "b"}, {}, "init.from: given together with init.source"),
    "misspelt": ({"form": "a"}, {}, "init.form: no such key"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_start_is_one_line(case, source, text_data, tmp_path, capsys):
    init, changes, said = WRONG[case]
    paths = {"tmp": tmp_path, "source": source}
    init = {key: value.format(**paths) for key, value in init.items()}
    done = run_main([str(recipe_in(tmp_path / "new", text_data, init=init, **changes))], capsys)
    assert done.code == 2 and said.format(**paths) in done.output and "Traceback" not in done.output, done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "new/run/checkpoints").exists()


def test_another_tokenizer_is_refused(source, text_data, tmp_path, capsys):
    shutil.copytree(source / "hf", tmp_path / "hf")
    record = json.loads((tmp_path / "hf/hola_export.json").read_text())
    record["tokenizer"]["sha256"] = "0" * 64
    (tmp_path / "hf/hola_export.json").write_text(json.dumps(record))
    done = run_main([str(recipe_in(tmp_path / "new", text_data, init={"from": str(tmp_path / "hf")}))], capsys)
    assert done.code == 2 and "data.tokenizer: bytes is not the one of init.from" in done.output, done.output
    assert len(done.output.strip().splitlines()) == 1
