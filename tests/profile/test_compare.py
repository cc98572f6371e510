"""tools/compare.py and the layer benchmark's gate: what can be shown without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from helpers import ROOT, run_tool, write_recipe

from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError
from hola_megatron.profile import rival
from hola_megatron.startup.start import start


def loaded(folder: str, name: str):
    """A script that is no module of a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_their_model_has_the_recipes_shape():
    """Counted from the arguments by their layer's definition: as many parameters as our GDN of the same recipe."""
    model = load_recipe(ROOT / "recipes/gdn_340m.yaml").model
    a = rival.rival_arguments(model)
    key = a["num_heads"] * a["head_dim"]
    value = int(key * a["expand_v"])
    width, heads = a["hidden_size"], a["num_heads"]
    mixer = width * (2 * key + 3 * value + 2 * heads) + (2 * key + value) * a["conv_size"] + 2 * heads + int(
        a["head_dim"] * a["expand_v"])
    layer = mixer + 3 * width * a["intermediate_size"] + 2 * width
    total = a["num_hidden_layers"] * layer + width + a["vocab_size"] * width * (1 if a["tie_word_embeddings"] else 2)
    assert total == 366_763_200
    assert a["fuse_norm"] and a["fuse_swiglu"] and a["fuse_cross_entropy"]


def test_a_shape_they_cannot_have_is_refused():
    with pytest.raises(RecipeError, match="has attention layers"):
        rival.rival_arguments(load_recipe(ROOT / "recipes/hola_1b_hybrid.yaml").model)


def test_missing_packages_are_named_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rival.importlib.util, "find_spec", lambda name: None)
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path, model__pattern="H")
    done = run_tool("compare", [str(recipe)], capsys)
    assert done.code == 1 and "pip install flash-linear-attention==0.6.0 transformers" in done.output
    assert "Traceback" not in done.output and len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(("words", "said"), [
    (["--sides", "hola,mamba"], "--sides: 'mamba' is not one of hola, gdn"), (["--steps", "0"], "--steps: 0 must be")])
def test_wrong_arguments_are_named(words, said, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path)
    done = run_tool("compare", [str(recipe), *words], capsys)
    assert done.code == 2 and said in done.output and len(done.output.splitlines()) == 1


def test_our_side_alone(tmp_path, capsys):
    recipe, out = write_recipe(tmp_path / "r.yaml", tmp_path, model__pattern="H"), tmp_path / "n.json"
    done = run_tool("compare", [str(recipe), "--sides", "gdn", "--alone", "--steps", "2", "--warmup", "1", "--json",
                                str(out)], capsys)
    assert done.code == 0, done.output
    gdn = json.loads(out.read_text())
    assert gdn["micro_batches"] == 1 and gdn["micro_batch_size"] == 2 and gdn["tokens_per_second"] > 0
    run_tool("compare", [str(recipe), "--sides", "hola", "--alone", "--steps", "1", "--warmup", "1", "--json",
                         str(out)], capsys)
    cache = 4 * (2 * 16 + 2 * 2)  # gamma_q, gamma_k, gate and sink of four layers
    assert json.loads(out.read_text())["parameters"] == gdn["parameters"] + cache


def test_the_table_says_how_many_times():
    compare = loaded("tools", "compare")
    row = {"tokens_per_second": 150_000.0, "ms_per_step": 437.0, "memory_gb": 90.0, "first_step_s": 40.0,
           "parameters": 366_800_000, "compiled_before": "nothing", "micro_batches": 1, "micro_batch_size": 32,
           "sequence_length": 2048, "device": "NVIDIA H200", "versions": {"torch": "2.11"}}
    text = compare.table({"hola": row, "fla-bf16": row | {"tokens_per_second": 100_000.0},
                          "fla-fp32": {"problem": "out of memory"}}).splitlines()
    assert text[4] == "| hola_megatron, the recipe | 366.8M | 150,000 | 1.50 | 437.0 | 90.0 | 40.0 | nothing |"
    assert "| 1.00 |" in text[5] and "out of memory" in text[6] and "x fla-fp32" not in text[2]


@pytest.mark.parametrize("kind", ["H", "G"])
def test_the_layers_gate_passes_and_can_fail(kind, monkeypatch):
    bench = loaded("kernels/benchmarks", "bench_layer")
    shape = bench.Shape(2, 700, 64, 2, 32)
    start(bench.recipe_of(shape, kind))
    assert bench.gate(shape, kind, "cpu") == []
    monkeypatch.setattr(bench, "GRADIENT_LIMIT", 1e-3)
    monkeypatch.setattr(bench, "OF_PLAIN", 0.5)  # on a CPU the layer is the plain one
    assert any("d in_proj.weight" in line for line in bench.gate(shape, kind, "cpu"))
