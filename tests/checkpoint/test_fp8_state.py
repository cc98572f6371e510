"""Scales and histories of delayed fp8 in checkpoints: plain tensors under public names, back where they were.

Transformer Engine needs a GPU (tests/gpu/test_fp8_gpu.py resumes it bit for bit); here its linears are stood in for by
the few attributes we use of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import MICRO
from torch import nn

from hola_megatron.checkpoint.folder import newest_usable
from hola_megatron.checkpoint.save_load import Saver, TrainerState, load, state_hash
from hola_megatron.config import build_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.engine.fp8_state import fp8_tensors, restore_fp8
from hola_megatron.engine.megatron import MegatronEngine
from hola_megatron.startup.start import start

HISTORY = 5


def quantize(linear: nn.Module, seed: int | None, history: int = HISTORY) -> None:
    """Give a linear what Transformer Engine's have; seed None: before its first step."""
    linear.fp8_meta = {}

    def init(recipe: SimpleNamespace) -> None:
        assert linear.fp8_meta["num_gemms"] == 1
        for direction, count in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            state = SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(recipe.length, count))
            linear.fp8_meta.setdefault(direction, state)

    linear.init_fp8_meta_tensors = init
    if seed is not None:
        linear.fp8_meta["num_gemms"] = 1
        init(SimpleNamespace(length=history))
        generator = torch.Generator().manual_seed(seed)
        for direction in ("scaling_fwd", "scaling_bwd"):
            for value in vars(linear.fp8_meta[direction]).values():
                value.copy_(torch.rand(value.shape, generator=generator))


def engine(seed: int | None, history: int = HISTORY) -> MegatronEngine:
    values = json.loads(json.dumps(MICRO))
    values["data"]["train"] = "unused"
    recipe = build_recipe(values)
    made = MegatronEngine(recipe, start(recipe))
    for number, layer in enumerate(made.model[0].module.decoder.layers):
        for place, linear in enumerate((layer.self_attention.in_proj, layer.self_attention.out_proj,
                                        layer.mlp.linear_fc1, layer.mlp.linear_fc2)):
            quantize(linear, None if seed is None else seed + 10 * number + place, history)
    # as with the delayed recipe, which this machine cannot have
    made.fp8_tensors = lambda: fp8_tensors(made.model)
    made.restore_fp8 = lambda stored: restore_fp8(made.model, SimpleNamespace(length=history), stored)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor], str]:
    folder, made = tmp_path_factory.mktemp("fp8"), engine(7)
    saver = Saver(made)
    recipe = made.recipe.to_dict()
    recipe["train"]["precision"], recipe["fp8"]["recipe"] = "bf16", "delayed"
    saver.begin(TrainerState(1, 8), folder, {"recipe": recipe})
    saver.writer.wait(60)
    return folder, {name: value.clone() for name, value in made.fp8_tensors().items()}, state_hash(made)


def test_names_are_public_and_complete(saved):
    _, tensors, _ = saved
    assert len(tensors) == 4 * 4 * 4
    assert tensors["model.layers.2.mlp.linear_fc1.scaling_fwd.amax_history"].shape == (HISTORY, 3)
    assert tensors["model.layers.0.mixer.in_proj.scaling_bwd.scale"].shape == (2,)


def test_a_fresh_engine_gets_all_of_it_back(saved):
    folder, tensors, digest = saved
    fresh = engine(None)
    assert fresh.fp8_tensors() == {} and state_hash(fresh) != digest
    load(fresh, newest_usable(folder)[0])
    assert fresh.fp8_tensors().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in fresh.fp8_tensors().items())
    assert state_hash(fresh) == digest


@pytest.mark.parametrize("length", [3, 8])
def test_a_history_of_another_length_is_cut_or_filled(length, saved):
    folder, tensors, _ = saved
    fresh = engine(None, length)
    load(fresh, newest_usable(folder)[0])
    for name, value in fresh.fp8_tensors().items():
        rows = min(length, HISTORY) if name.endswith("history") else len(value)
        assert torch.equal(value[:rows], tensors[name][:rows]) and not value[rows:].any()


def test_a_refused_batch_leaves_no_trace_in_them(saved):
    _, tensors, _ = saved
    made = engine(7)

    def judge(loss: float, grad_norm: float) -> str:
        for value in made.fp8_tensors().values():
            value.fill_(torch.inf)  # as the batch would have left them
        return "no"

    ones = torch.ones(2, 64)
    assert made.train_step([Batch(ones.long(), ones.long(), ones, None)], 1e-2, judge).problem == "no"
    assert all(torch.equal(value, tensors[name]) for name, value in made.fp8_tensors().items())


def test_a_checkpoint_without_scales_starts_them_anew(tmp_path):
    values = json.loads(json.dumps(MICRO))
    values["data"]["train"] = "unused"
    recipe = build_recipe(values)
    plain = MegatronEngine(recipe, start(recipe))
    saver = Saver(plain)
    saver.begin(TrainerState(1, 8), tmp_path, {})
    saver.writer.wait(60)
    fresh = engine(None)
    load(fresh, newest_usable(tmp_path)[0])
    assert fresh.fp8_tensors() == {}
    used = engine(7)  # goes back to where there were none
    load(used, newest_usable(tmp_path)[0])
    assert {(name.rpartition(".")[2], float(value.min()), float(value.max()))
            for name, value in used.fp8_tensors().items()} == {("scale", 1.0, 1.0), ("amax_history", 0.0, 0.0)}


def test_a_model_trained_in_fp8_is_exported_like_any_other(saved, tmp_path):
    """By its float32 weights, and compared with the Megatron model on a machine that knows no fp8."""
    from safetensors import safe_open

    from hola_megatron.hf.convert import to_hf
    from hola_megatron.hf.verify import verify

    to_hf(saved[0], tmp_path / "hf", verify=verify)
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names and not [name for name in names if "scal" in name or "amax" in name]
