"""Conversions both ways: bit for bit in weights, equal in logits, and nothing half-written on bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT, checkpoint_tensors, metric_rows, run_main, run_tool, write_recipe
from safetensors.torch import load_file, save_file
from tiny import export, recipe, tokens

from hola_megatron.checkpoint.folder import file_digest, find_checkpoint, finish_writing, start_writing
from hola_megatron.config import Recipe, build_recipe, load_recipe
from hola_megatron.errors import CheckpointError, DataError, RecipeError
from hola_megatron.hf.auto import load_model
from hola_megatron.hf.convert import ExportOptions, from_hf, to_hf
from hola_megatron.hf.shape import config_of, differences, model_section
from hola_megatron.hf.verify import verify
from hola_megatron.startup.start import stop
from hola_megatron.train.loop import train

FAMILIES = {
    "hola": {"pattern": "H"}, "gdn": {"pattern": "G"}, "transformer": {"pattern": "A", "rope_theta": 500.0},
    "hybrid": {"pattern": "HGHA", "tie_embeddings": False},
    "delta_net": {"pattern": "GH", "rule": "delta", "beta_range": 2},
    "late": {"pattern": "G", "state_delay": 5}, "late_chunk": {
        "pattern": "G", "state_delay": 9, "state_delay_mode": "chunk"},
    "late_hola": {"pattern": "H", "state_delay": 11, "cache": {"local": "window", "window": 11}},
    "hqlt": {"pattern": "hqlt"}, "hqlt_stream": {"pattern": "hqlt, hola", "hqlt": {
        "blend": "delayed_stream", "window": 7, "mixing": "scalar", "rope_theta": 300.0}},
    "hqlt_chunk": {"pattern": "hqlt, attention", "hqlt": {
        "blend": "delayed_chunk", "window": 9, "mixing": "sum", "rope_theta": 1e4}},
    "ham": {"pattern": "ham", "ham": {"router": "cosine", "share": 0.1, "threshold": 1.0}},
    "ham_learned": {"pattern": "ham, hola", "ham": {"router": "learned", "router_width": 6, "threshold": 0.5}},
    "l2_recency": {"pattern": "H", "cache": {"read_norm": "l2", "score": "recency", "sink": False}},
    "window": {"pattern": "HG", "cache": {"local": "window", "window": 11}},
    "no_state": {"pattern": "H", "rule": "none", "cache": {"score": "betav", "local": "window", "window": 11}},
    "no_state_learned": {"pattern": "HA", "rule": "none", "cache": {
        "score": "learned", "router_width": 4, "rope_theta": 300.0, "local": "none"}},
    "no_state_no_slots": {"pattern": "H", "rule": "none", "cache": {"slots": 0}},
    "deltaproduct": {"pattern": "deltaproduct, hola", "delta_steps": 3, "beta_range": 2},
    "convex": {"pattern": "HG", "cache": {"merge": "convex", "rope_theta": 300.0}},
    "two_gates": {"pattern": "H", "cache": {"merge": "two", "local": "window", "window": 11, "slots": 0}},
    "block_alone": {"pattern": "H", "cache": {"slots": 0, "read_norm": "none"}},
    "cosine": {"pattern": "H", "cache": {"score": "cosine"}},
    "learned": {"pattern": "HG", "cache": {"score": "learned", "router_width": 4, "merge": "two"}},
    "random": {"pattern": "HG", "cache": {"score": "random"}},
    "recency": {"pattern": "H", "cache": {"score": "recency"}},
    "grouped": {"pattern": "AH", "attention_heads": 4, "attention_kv_heads": 2, "attention_qk_norm": True},
    "attention_window": {"pattern": "WWA", "attention_heads": 4, "attention_kv_heads": 1, "attention_window": 20},
    "no_positions": {"pattern": "HA", "rope_theta": None, "conv_width": 3},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One export with every kind of layer, for tests that only look at it."""
    return export(tmp_path_factory.mktemp("exported") / "out", recipe())


@pytest.fixture(scope="module")
def run(exported: Path) -> Path:
    """A run folder made from it."""
    return from_hf(exported, exported.parent / "run").parent.parent


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bitwise_and_agrees_in_logits(family, tmp_path):
    """A run of any recipe family -> Hugging Face -> a run: the same bits, and the Megatron model's logits."""
    first = from_hf(export(tmp_path / "seed", recipe(**FAMILIES[family])), tmp_path / "first")
    proofs = []
    to_hf(tmp_path / "first", tmp_path / "out", verify=lambda *given: proofs.append(verify(*given)))
    second = from_hf(tmp_path / "out", tmp_path / "second")
    before, after = checkpoint_tensors(first), checkpoint_tensors(second)
    assert before.keys() == after.keys() and len(before) > 10
    assert all(torch.equal(before[name], after[name]) for name in before)
    # the weights are lively: logits of size 1 to 10
    assert proofs[0].worst <= proofs[0].limit <= 2e-4 and proofs[0].same_greedy == proofs[0].tokens > 90


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_has_a_config_and_the_way_back(name):
    made = load_recipe(ROOT / "recipes" / name)
    if made.model.moe.experts is not None:
        with pytest.raises(CheckpointError, match=r"model.moe.experts: \d+: models with experts have no exported form"):
            config_of(made)
        return
    section = made.to_dict()["model"]
    assert differences(section, model_section(config_of(made))) == []
    for change in ({"layers": section["layers"] + 1}, {"hidden_size": 8}, {"vocab_size": 9}):
        assert len(differences(section | change, model_section(config_of(made)))) >= 1


def test_shards_of_any_cut_are_put_together(run, exported, tmp_path):
    """What tensor-parallel ranks write: every tensor in two pieces, along rows or columns, in two files."""
    cut = tmp_path / "cut"
    cut_in_two(run, cut)
    to_hf(cut, tmp_path / "out", ExportOptions(shard_bytes=50_000), verify=verify)
    whole = load_file(exported / "model.safetensors")
    files = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 2 and all(f"of-{len(files):05d}" in file.name for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    assert found.keys() == set(index["weight_map"]) == set(whole) - {"lm_head.weight"}
    assert all(torch.equal(found[name], whole[name]) for name in found)
    torch.testing.assert_close(load_model(tmp_path / "out")(tokens(1, 40)).logits,
                               load_model(exported)(tokens(1, 40)).logits)


def cut_in_two(run: Path, target: Path) -> None:
    """Copy a checkpoint with every tensor cut in the middle, along columns where there are some."""
    source = find_checkpoint(run)
    folder = start_writing(target / "checkpoints", source.step)
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    manifest = json.loads(json.dumps(source.manifest))
    for name, tensor in checkpoint_tensors(source.path).items():
        axis = tensor.ndim - 1
        middle = tensor.shape[axis] // 2
        parts = tensor.tensor_split((middle,), axis)
        for half, part in zip(halves, parts, strict=True):
            half[name] = part.contiguous()
        manifest["tensors"]["weight"][name]["shards"] = [
            {"file": f"half{n}.safetensors", "key": name, "axis": axis, "offset": n * middle, "rows": part.shape[axis]}
            for n, part in enumerate(parts)]
    manifest["files"], manifest["tensors"] = {}, {"weight": manifest["tensors"]["weight"]}
    for n, half in enumerate(halves):
        file = folder / f"half{n}.safetensors"
        save_file(half, file)
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    finish_writing(folder, manifest)


def test_bf16_export_is_compared_with_rounded_weights(run, tmp_path):
    to_hf(run, tmp_path / "out", ExportOptions(dtype="bf16"), verify=verify)
    held = load_file(tmp_path / "out" / "model.safetensors")
    wide = {name.rpartition(".")[2] for name, x in held.items() if x.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias", "gamma_q", "gamma_k", "gate", "sink"}
    assert load_model(tmp_path / "out").dtype == torch.bfloat16
    from_hf(tmp_path / "out", tmp_path / "back", verify=verify)


def test_everything_a_user_needs_travels_along(run, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    to_hf(run, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Ab", add_special_tokens=False)["input_ids"] == [65, 98]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (257, 257, "left")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 257
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"configuration_hola.py", "modeling_hola.py", "cache_hola.py", "decoding_hola.py", "hola_ops.py",
            "hola_export.json"} <= names
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o044 == 0o044, path  # others may read it
        if path.suffix != ".safetensors":
            assert str(run) not in path.read_text(), path  # no path of this machine travels


def test_training_goes_on_from_an_import(tmp_path, text_data, capsys):
    """A real run, exported and imported, trains on: as a new run and as the run it was."""
    made = write_recipe(tmp_path / "r.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=3,
                        checkpoint__every=2, checkpoint__keep=3)
    train_here(load_recipe(made))
    whole = metric_rows(tmp_path / "run")
    step_2 = tmp_path / "run" / "checkpoints" / "step_00000002"
    to_hf(step_2, tmp_path / "out")

    from_hf(tmp_path / "out", tmp_path / "on")
    done = run_main([str(tmp_path / "on" / "recipe.yaml")], capsys)
    assert done.code == 0 and "resuming at step 2" in done.output, done.output[-3000:]
    rows = metric_rows(tmp_path / "on")
    # step 3 sees the weights and the samples it saw in the whole run; its loss is taken before the update
    assert [row["step"] for row in rows] == [3] and rows[0]["loss"] == pytest.approx(whole[2]["loss"], rel=1e-6)
    assert find_checkpoint(tmp_path / "on").manifest["optimizer_step"] == 1

    from_hf(tmp_path / "out", tmp_path / "new", load_recipe(made, ["train.steps=2"]))
    train_here(load_recipe(tmp_path / "new" / "recipe.yaml"))
    rows = metric_rows(tmp_path / "new")
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["loss"] < whole[0]["loss"] - 0.05


def train_here(made: Recipe) -> None:
    try:
        train(made)
    finally:
        stop()


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_model_that_disagrees_is_refused(run, exported, tmp_path):
    wrong = export(tmp_path / "wrong", recipe(), seed=1)
    with pytest.raises(CheckpointError, match=r"does not give its logits \(max difference .*must not be used"):
        verify(find_checkpoint(run), wrong)
    close = tmp_path / "close"
    to_hf(run, close)
    held = load_file(close / "model.safetensors")
    held["model.layers.2.mixer.gamma_k"] *= 1.002  # one small vector of one layer
    save_file(held, close / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="must not be used"):
        verify(find_checkpoint(run), close)

    def never(checkpoint, folder):
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        to_hf(run, tmp_path / "refused", verify=never)
    with pytest.raises(CheckpointError, match="no"):
        from_hf(exported, tmp_path / "refused_run", verify=never)
    assert left_in(tmp_path) == {"wrong", "close"}


def test_a_checkpoint_of_another_recipe_is_refused(run, tmp_path):
    other = export(tmp_path / "other", recipe("HGHA", heads=1))
    with pytest.raises(CheckpointError, match=r"another recipe than .*model.heads: 2 here, 1 there"):
        verify(find_checkpoint(run), other)
    values = recipe().to_dict()
    values["model"]["cache"]["slots"] = 5
    values["model"]["layers"] = 2
    with pytest.raises(RecipeError) as caught:
        from_hf(other, tmp_path / "x", build_recipe(values))
    assert {p.split(":")[0] for p in caught.value.problems} == {
        "model.heads", "model.layers", "model.layer kinds", "model.cache.slots"}
    assert left_in(tmp_path) == {"other"}


def test_missing_and_damaged_shards_are_named(run, tmp_path):
    to_hf(run, tmp_path / "out", ExportOptions(shard_bytes=50_000))
    shard = tmp_path / "out" / "model-00002-of-00005.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00005.safetensors: missing"):
        from_hf(tmp_path / "out", tmp_path / "x")
    shard.write_bytes(data[:1000])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00005.safetensors: damaged"):
        from_hf(tmp_path / "out", tmp_path / "x")
    held = find_checkpoint(run)
    copy = tmp_path / "copy" / held.path.name
    copy.mkdir(parents=True)
    for file in held.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "weights-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights-00000.safetensors: missing; use another checkpoint"):
        to_hf(copy, tmp_path / "x")
    assert left_in(tmp_path) == {"out", "copy"}


def test_tensors_that_do_not_fit_are_named(exported, tmp_path):
    from hola_megatron.hf.weights import ModelReader, write_model

    reader = ModelReader(exported)
    bad = {name: reader.read(name) for name in reader.names()}
    bad["model.layers.1.mixer.gate"] = torch.zeros(2)  # layer 1 is a GDN layer
    bad["model.norm.weight"] = bad["model.norm.weight"][:5].clone()
    del bad["model.layers.0.mixer.sink"]
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "config.json").write_bytes((exported / "config.json").read_bytes())
    write_model(bad.items(), folder, 10**9)
    with pytest.raises(CheckpointError, match=r"model.layers.0.mixer.sink is missing \(and 2 more\)"):
        from_hf(folder, tmp_path / "x")
    assert left_in(tmp_path) == {"bad"}


def test_wrong_architecture_is_named(exported, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config.json"):
        from_hf(tmp_path, tmp_path / "x")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"type 'llama', not 'hola'"):
        from_hf(tmp_path, tmp_path / "x")
    (tmp_path / "config.json").write_text('{"model_ty')
    with pytest.raises(CheckpointError, match=r"config.json: damaged"):
        from_hf(tmp_path, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"no checkpoint here"):
        to_hf(exported, tmp_path / "x")
    assert left_in(tmp_path) == {"config.json"}


def test_another_tokenizer_is_refused(run, exported, tmp_path):
    from tokenizers import Tokenizer, models

    other = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    other.add_special_tokens(["<|endoftext|>"])
    other.save(str(tmp_path / "tokenizer.json"))
    named = str(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"is huggingface of 3 tokens.*trained with bytes of 258 tokens"):
        to_hf(run, tmp_path / "x", ExportOptions(tokenizer=named))
    with pytest.raises(DataError, match=r"no such file or folder.*--tokenizer names another path"):
        to_hf(run, tmp_path / "x", ExportOptions(tokenizer="gone"))
    values = recipe().to_dict()
    values["data"]["tokenizer"] = named
    with pytest.raises(DataError, match=r"is huggingface of 3 tokens"):
        from_hf(exported, tmp_path / "x", build_recipe(values))
    assert left_in(tmp_path) == {"tokenizer.json"}


def test_existing_folders_are_never_lost(run, exported, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="exists and is no folder written by this tool"):
            to_hf(run, mine, ExportOptions(overwrite=overwrite))
    with pytest.raises(CheckpointError, match="exists and is no folder written by this tool"):
        from_hf(exported, run)
    to_hf(run, tmp_path / "out")
    with pytest.raises(CheckpointError, match="out: exists; choose another name, or pass --overwrite"):
        to_hf(run, tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("of the earlier export")
    to_hf(run, tmp_path / "out", ExportOptions(overwrite=True))
    assert "stale.txt" not in left_in(tmp_path / "out") and left_in(tmp_path) == {"mine", "out"}
    blocked = tmp_path / "mine" / "thesis.tex" / "out"
    with pytest.raises(CheckpointError, match="could not be written"):
        to_hf(run, blocked)


def test_an_import_without_a_recipe_says_so(exported, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in exported.iterdir():
        if file.name != "hola_export.json":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RecipeError, match="carries no recipe .*name one with --recipe"):
        from_hf(bare, tmp_path / "x")
    assert from_hf(bare, tmp_path / "x", recipe()).name == "step_00000000"


def test_the_program_prints_the_proof_and_errors_as_one_line(run, exported, tmp_path, capsys):
    out = str(tmp_path / "out")
    done = run_tool("convert", ["to-hf", str(run), out, "--dtype", "bf16"], capsys)
    assert done.code == 0 and done.output.splitlines()[-1] == f"done: {out}"
    assert re.search(r"logits of 160 tokens \| max difference \d\.\d+e-\d+.*\| mean .*greedy tokens equal 160 of 160",
                     done.output)
    assert run_tool("convert", ["verify", str(run), out], capsys).output.endswith("verified\n")
    done = run_tool("convert", ["to-hf", str(run), out, "--overwrite", "--no-verify"], capsys)
    assert done.code == 0 and "warning: --no-verify" in done.output and "max difference" not in done.output
    done = run_tool("convert", ["from-hf", out, str(tmp_path / "back")], capsys)
    assert done.code == 0 and f"hola_megatron.train {tmp_path / 'back' / 'recipe.yaml'}" in done.output
    done = run_tool("convert", ["from-hf", str(exported), str(run)], capsys)
    assert done.code == 2
    assert done.output.strip().splitlines()[-1].startswith(f"CheckpointError: {run}: exists and is no folder written")
