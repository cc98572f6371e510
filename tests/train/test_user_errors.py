"""What a user can get wrong, at the real program: one line, the right exit code, nothing lost."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import run_main, run_program, small_recipe
from train.quick_launch import launch_quickly

from hola_megatron.checkpoint.folder import Checkpoint, newest_usable
from hola_megatron.config import MoeConfig, Recipe, load_recipe
from hola_megatron.errors import RecipeError
from hola_megatron.train.loop import train
from hola_megatron.train.recipe_changes import accept_changes, changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_data) -> Path:
    """A folder with recipe.yaml and a run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = small_recipe(folder / "recipe.yaml", text_data / "train", run_dir=str(folder / "run"), train__steps=2)
    train(load_recipe(recipe))
    return folder


@pytest.fixture
def attempt(capsys):
    """attempt(folder, arguments...) runs the program on the folder's recipe: (exit code, what it said)."""
    def run(folder: Path, *arguments: str) -> tuple[int, str]:
        done = run_main([str(folder / "recipe.yaml"), *arguments], capsys)
        return done.code, done.output
    return run


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    text = (finished / "recipe.yaml").read_text().replace(str(finished), str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path


@pytest.mark.distributed
def test_errors_of_the_real_program_are_said_once_by_all_ranks_together(copy):
    """Before the process group exists (recipe) and after (data)."""
    for change, wanted, said in (
            ("train.stps=3", 2, "train.stps: no such key (did you mean train.steps?)"),
            (f"data.train={copy / 'nothing'}", 3, f"{copy / 'nothing'}: no such data folder")):
        words = ["-m", "hola_megatron.train", str(copy / "recipe.yaml"), change]
        done = launch_quickly(words, copy / "log.txt", ranks=2)
        assert done.code == wanted and done.output.count(said) == 1 and "Traceback" not in done.output, done.output


def test_processes_that_do_not_fit(copy, attempt):
    code, said = attempt(copy, "parallel.tensor=2")
    assert code == 2 and "does not divide the 1 processes" in said


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_log_that_needs_a_package_is_refused_before_anything_is_said(copy, attempt):
    code, said = attempt(copy, "log.wandb_project=mine", f"run_dir={copy / 'other'}")
    assert code == 2 and not (copy / "other").exists() and len(said.splitlines()) == 1
    assert "log.wandb_project: needs the package wandb, which is not installed; install it" in said


def test_a_transformer_engine_that_does_not_load_is_named(copy):
    package = copy / "site" / "transformer_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise OSError("libcudnn_graph.so.9: cannot open shared object file")')
    done = run_program(["-m", "hola_megatron.train", str(copy / "recipe.yaml")], copy / "log.txt",
                       environment={"PYTHONPATH": str(copy / "site")})
    assert done.code == 2 and len(done.output.splitlines()) == 1, done.output
    assert "transformer-engine: is installed and does not load (libcudnn_graph.so.9: cannot open" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")
@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise"])
def test_fp8_without_the_machine_for_it(recipe, copy, attempt):
    code, said = attempt(copy, f"fp8.recipe={recipe}", "train.precision=bf16", "--new")
    assert code == 2 and f"fp8.recipe: {recipe} needs Transformer Engine and a CUDA device" in said
    assert "Traceback" not in said


def test_empty_data_folder(copy, attempt):
    (copy / "empty").mkdir()
    code, said = attempt(copy, f"data.train={copy / 'empty'}", f"run_dir={copy / 'other'}")
    assert code == 3 and str(copy / "empty") in said


def test_damaged_shard(copy, attempt, text_data):
    shutil.copytree(text_data / "train", copy / "data")
    shard = next((copy / "data").glob("shard.*.mds"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, said = attempt(copy, f"data.train={copy / 'data'}", f"run_dir={copy / 'other'}")
    assert code == 3 and shard.name in said


def test_tokenizer_mismatch(copy, attempt, text_data):
    shutil.copytree(text_data / "train", copy / "data")
    about = json.loads((copy / "data/dataset.json").read_text())
    about["tokenizer"]["sha256"] = "0" * 64
    (copy / "data/dataset.json").write_text(json.dumps(about))
    code, said = attempt(copy, f"data.train={copy / 'data'}", f"run_dir={copy / 'other'}")
    assert code == 3 and "tokenizer" in said


def test_a_sequence_longer_than_the_data(copy, attempt):
    code, said = attempt(copy, "train.sequence_length=10000000", f"run_dir={copy / 'other'}")
    assert code == 3 and "less than one sample of train.sequence_length = 10000000; take more text" in said
    assert len(said.strip().splitlines()) == 1


def test_a_changed_recipe_does_not_silently_go_on(copy, attempt):
    code, said = attempt(copy, "train.learning_rate=1e-4", "train.beta1=0.8", "train.steps=4")
    assert code == 2
    assert "train.learning_rate: was 0.003" in said and "train.beta1: was 0.9" in said and "--allow-change" in said
    assert "train.steps" not in said and "another name (name=micro-2)" in said
    code, said = attempt(copy, "train.learning_rate=1e-4", "train.beta1=0.8", "train.steps=4", "log.every=2",
                         "--allow-change")
    assert code == 0 and "resuming at step 2" in said
    told = [line for line in said.splitlines() if line.startswith("changed | ") and "run_dir" not in line]
    assert told == ["changed | log.every: 1 -> 2", "changed | train.beta1: 0.9 -> 0.8 (--allow-change)",
                    "changed | train.learning_rate: 0.003 -> 0.0001 (--allow-change)", "changed | train.steps: 2 -> 4",
                    "changed | learning rate of step 3: 0.003 -> 0.0001; schedule: up to 0.0001 over 2 steps, cosine "
                    "to 0 at step 4"]


def test_a_run_may_become_longer_and_its_data_may_move(copy, attempt, text_data):
    """Neither needs a flag; becoming shorter, and other data at the old place, do."""
    shutil.copytree(text_data / "train", copy / "moved")
    moved = f"data.train=[{{path: {copy / 'moved'}, weight: 3.0}}]"
    code, said = attempt(copy, "train.steps=3", moved)
    assert code == 0 and "changed | train.steps: 2 -> 3" in said and "changed | data.train: " in said
    assert attempt(copy, "train.steps=3", moved)[0] == 0
    code, said = attempt(copy, "train.steps=2", moved)
    assert code == 2 and "train.steps: was 3" in said and "data.train" not in said
    code, said = attempt(copy, "train.steps=4", f"data.train={text_data / 'valid'}")
    assert code == 2 and "data.train: was" in said and "data.train (fingerprint): was " in said
    shutil.rmtree(copy / "moved")
    shutil.copytree(text_data / "valid", copy / "moved")
    code, said = attempt(copy, "train.steps=4", moved)
    assert code == 2 and "data.train (fingerprint): was " in said and "data.train: was" not in said


def test_checkpoints_that_are_all_damaged_stop_the_run(copy, attempt):
    weights = next((copy / "run/checkpoints/step_00000002").glob("weights*"))
    weights.write_bytes(weights.read_bytes()[:-4])
    code, said = attempt(copy)
    assert code == 2
    assert weights.name in said and "no checkpoint of this run is usable" in said
    code, said = attempt(copy, "--new", "train.steps=2")
    assert code == 0 and "new run" in said
    assert (copy / "run.old-1/checkpoints/step_00000002").is_dir()


def test_a_checkpoint_of_another_model(copy, attempt):
    code, said = attempt(copy, "model.mlp_hidden_size=96", "--allow-change")
    assert code == 2 and "belongs to another model" in said and "mlp" in said


def test_a_finished_run_is_left_alone(copy, attempt):
    code, said = attempt(copy)
    assert code == 0 and "finished: 2 steps" in said


def test_diverging_stops_with_code_4_and_names_the_samples(copy, attempt):
    code, said = attempt(copy, "train.learning_rate=1e15", "train.steps=20", "train.warmup_steps=0",
                         "guard.max_skips=1", f"run_dir={copy / 'bad'}")
    assert code == 4
    assert "skipped | step" in said and "2 steps in a row had bad numbers" in said
    (incident,) = (copy / "bad/incidents").iterdir()
    assert json.loads((incident / "incident.json").read_text())[1]["last_sample"] > 0


def test_a_checkpoint_older_than_a_field_goes_on_unless_the_field_is_set(copy, attempt, text_data):
    """A field's default is what the code did before there was the field; rounding may change, what is computed not."""
    recipe = load_recipe(copy / "recipe.yaml")
    checkpoint, _ = newest_usable(copy / "run/checkpoints")
    old = checkpoint.manifest["recipe"]
    for section, key in ((None, "fp8"), ("model", "moe"), ("parallel", "expert"), ("train", "logits_budget_gb"),
                         ("train", "optimizer"), ("train", "muon_momentum"), ("train", "muon_steps")):
        del (old[section] if section else old)[key]
    old["model"]["decay"] = {"gdn": True}[old["model"].pop("rule")]  # the name that the rule had
    fingerprint = checkpoint.manifest["data_fingerprint"]
    refuse_changes(recipe, checkpoint, fingerprint)
    refuse_changes(changed(recipe, "train", logits_budget_gb=None), checkpoint, fingerprint)
    for section, key, value in (("fp8", "recipe", "current"), ("fp8", "amax_history", 8),
                                ("train", "optimizer", "muon"), ("model", "norm_eps", 1e-5),
                                ("model", "rule", "delta")):
        with pytest.raises(RecipeError, match=f"{section}.{key}: was .* now {value!r}"):
            refuse_changes(changed(recipe, section, **{key: value}), checkpoint, fingerprint)


def test_the_micro_batch_is_free_but_for_experts_that_a_loss_balances(copy):
    recipe, whole = load_recipe(copy / "recipe.yaml"), newest_usable(copy / "run/checkpoints")[0]
    balanced_by_bias = MoeConfig(experts=4, balancing="bias")
    for moe, free in ((MoeConfig(), True), (balanced_by_bias, True), (MoeConfig(experts=4), False)):
        made = changed(recipe, "model", moe=moe)
        checkpoint = Checkpoint(copy, {**whole.manifest, "recipe": made.to_dict()})
        with contextlib.nullcontext() if free else pytest.raises(RecipeError, match="train.micro_batch_size: was 4"):
            refuse_changes(changed(made, "train", micro_batch_size=2), checkpoint, whole.manifest["data_fingerprint"])


def test_another_tokenizer_or_validation_set_under_its_old_name_is_told(copy):
    recipe, whole = load_recipe(copy / "recipe.yaml"), newest_usable(copy / "run/checkpoints")[0]
    tokenizer, data = whole.manifest["tokenizer"], whole.manifest["data_fingerprint"]
    found = changes(recipe, whole, data, tokenizer | {"sha256": "0" * 64, "eos_id": 0}, "f" * 64)
    assert [(change.key, change.free) for change in found if "." in change.key and "(" in change.key] == [
        ("data.tokenizer (eos_id)", False), ("data.tokenizer (sha256)", False)]
    before = Checkpoint(copy, {**whole.manifest, "valid_fingerprint": "a" * 64})
    told = [change for change in changes(recipe, before, data, tokenizer, "f" * 64) if "valid" in change.key]
    assert [(str(change), change.free) for change in told] == [
        (f"data.valid (fingerprint): {'a' * 12} -> {'f' * 12}", True)]


def refuse_changes(recipe: Recipe, checkpoint: Checkpoint, fingerprint: str) -> None:
    tokenizer = checkpoint.manifest.get("tokenizer", {})
    accept_changes(changes(recipe, checkpoint, fingerprint, tokenizer), checkpoint, recipe,
                   allow=False)


def changed(recipe: Recipe, section: str, /, **values: object) -> Recipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})
