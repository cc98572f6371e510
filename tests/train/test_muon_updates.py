"""Muon: what is orthogonalised and how much it moves; everything else is AdamW's, number for number."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import MICRO
from torch import Tensor

from hola_megatron.config import build_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.errors import CheckpointError, RecipeError
from hola_megatron.startup.start import start

RATE, DECAY = 1e-2, 0.1
HEADS, KEY, WIDTH, MLP = 2, 16, 32, 64


def engine(optimizer: str = "muon", **train: Any):
    from hola_megatron.engine.megatron import MegatronEngine

    values = json.loads(json.dumps(MICRO))
    values["data"]["train"] = "unused"
    values["train"] |= {"optimizer": optimizer, "clip_grad_norm": 0.0, **train}
    values["parallel"] = {"distributed_optimizer": False}
    recipe = build_recipe(values)
    return MegatronEngine(recipe, start(recipe))


def logical(made, kind: str = "weight") -> dict[str, Tensor]:
    found = {}
    for shard in made.param_shards():
        held = made.state.gather(shard.parameter, 0)
        if kind in held:
            found[shard.name] = shard.of(held[kind]).clone()
    return found


def step(made, seed: int = 1) -> None:
    tokens = torch.randint(0, 264, (2, 65), generator=torch.Generator().manual_seed(seed))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(2, 64), None)
    assert made.train_step([batch], RATE).updated


@pytest.fixture(scope="module")
def updates() -> dict[str, Tensor]:
    """What the first step adds to every logical tensor, with the decay of its weight taken out, over the rate."""
    made = engine()
    before = logical(made)
    step(made)
    return {name: (x - before[name] * (1 - RATE * DECAY if x.ndim == 2 else 1)) / -RATE
            for name, x in logical(made).items()}


def singular(x: Tensor) -> Tensor:
    """Singular values of an update, without the scale that its shape gives it."""
    return torch.linalg.svdvals(x.double()) / (0.2 * max(x.shape) ** 0.5)


@pytest.mark.parametrize("section", ["q", "k", "v", "g"])
@pytest.mark.parametrize("layer", [0, 1, 3])  # HOLA, Gated DeltaNet, attention
def test_every_heads_section_is_orthogonal_by_itself(section, layer, updates):
    if (layer, section) == (3, "g"):
        pytest.skip("attention has no gate")
    found = updates[f"model.layers.{layer}.mixer.{section}_proj.weight"]
    values = torch.cat([singular(head) for head in found.split(KEY)])
    # five quintic steps leave singular values around one; a plain gradient's span orders of magnitude
    assert 0.5 < values.median() < 1.3 and values.max() < 1.3
    assert found.square().mean().sqrt() == pytest.approx(0.2, rel=0.4)  # as an update of Adam's


def test_heads_are_not_orthogonalised_together(updates):
    """Two matrices of 16 x 32 are no orthogonal one of 32 x 32: rows of different heads are not at right angles."""
    found = updates["model.layers.0.mixer.q_proj.weight"]
    across = found[:KEY] @ found[KEY:].t() / (0.2 * WIDTH ** 0.5) ** 2
    assert across.norm() > 0.3


@pytest.mark.parametrize(("name", "shape"), [("mixer.o_proj", (WIDTH, WIDTH)), ("mlp.gate_proj", (MLP, WIDTH)),
                                             ("mlp.up_proj", (MLP, WIDTH)), ("mlp.down_proj", (WIDTH, MLP))])
def test_the_other_linears_are_one_matrix_each(name, shape, updates):
    found = updates[f"model.layers.2.{name}.weight"]
    assert found.shape == shape
    values = singular(found)
    assert 0.5 < values.median() < 1.3 and values.max() < 1.3


@pytest.mark.parametrize("section", ["a", "b"])
def test_rows_that_are_a_head_by_themselves_get_unit_length(section, updates):
    found = updates[f"model.layers.0.mixer.{section}_proj.weight"] / (0.2 * WIDTH ** 0.5)
    assert found.shape == (HEADS, WIDTH)
    assert found.norm(dim=-1).tolist() == pytest.approx([1.0] * HEADS, rel=1e-4)


def test_everything_else_is_moved_by_adamw():
    made, plain = engine(), engine("adamw")
    step(made)
    step(plain)
    second, mine, theirs = logical(made, "exp_avg_sq"), logical(made), logical(plain)
    assert {name.split(".", 3)[-1] for name in mine.keys() - second.keys()} == {
        *(f"mixer.{x}_proj.weight" for x in "qkvgbao"), *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down"))}
    assert all(torch.equal(mine[name], theirs[name]) for name in second)
    assert {"model.embed_tokens.weight", "model.layers.0.mixer.A_log", "model.layers.0.mixer.q_conv.weight",
            "model.layers.0.mixer.gamma_q", "model.layers.0.mixer.gate",
            "model.layers.0.mixer_norm.weight"} <= set(second)
    assert not any(torch.equal(mine[name], theirs[name]) for name in mine.keys() - second.keys())


def test_momentum_decay_and_rate_are_those_of_the_definition():
    """Two steps of one MLP matrix, followed by hand from its momentum."""
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

    made, name = engine(muon_momentum=0.9, muon_steps=4), "model.layers.2.mlp.down_proj.weight"
    step(made)
    before, mean = logical(made)[name], logical(made, "exp_avg")[name]
    step(made, 2)
    gradient = (logical(made, "exp_avg")[name] - 0.9 * mean) / 0.1
    direction = 0.1 * gradient + 0.9 * logical(made, "exp_avg")[name]
    change = logical(made)[name] - before * (1 - RATE * DECAY)

    def wanted(direction: Tensor, steps: int) -> Tensor:
        return -RATE * 0.2 * MLP ** 0.5 * newton_schulz(direction, steps, "quintic")

    assert (change - wanted(direction, 4)).norm() < 1e-3 * change.norm()
    for other in (wanted(logical(made, "exp_avg")[name], 4), wanted(gradient, 4), wanted(direction, 5)):
        assert (change - other).norm() > 1e-2 * change.norm()


def test_training_makes_progress_in_bf16_too():
    for precision in ("fp32", "bf16"):
        made = engine(precision=precision, learning_rate=1e-2)
        tokens = torch.randint(0, 264, (2, 65), generator=torch.Generator().manual_seed(1))
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(2, 64), None)
        losses = [made.train_step([batch], RATE).loss for _ in range(8)]
        assert losses[-1] < losses[0] - 1.0


def test_a_missing_package_is_named(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "emerging_optimizers" else
                        find(name, *a))
    with pytest.raises(RecipeError, match="train.optimizer: muon needs the package emerging-optimizers"):
        engine()


def test_whole_matrices_are_needed_on_every_data_rank():
    values = json.loads(json.dumps(MICRO))
    values["train"]["optimizer"] = "muon"
    with pytest.raises(RecipeError, match="train.optimizer: muon needs whole matrices"):
        build_recipe(values)


def test_moments_of_another_optimizer_are_refused(tmp_path):
    from hola_megatron.checkpoint.folder import newest_usable
    from hola_megatron.checkpoint.save_load import Saver, TrainerState, load

    made = engine()
    saver = Saver(made)
    saver.begin(TrainerState(1, 8), tmp_path, {})
    saver.writer.wait(60)
    load(engine(), newest_usable(tmp_path)[0])
    with pytest.raises(CheckpointError, match="has no exp_avg_sq of .* saved by another optimizer than adamw"):
        load(engine("adamw"), newest_usable(tmp_path)[0])


def test_muon_does_not_take_adamws_moments_but_the_zeros_of_imported_weights(tmp_path):
    from hola_megatron.checkpoint.folder import newest_usable
    from hola_megatron.checkpoint.save_load import Saver, TrainerState, load

    plain = engine("adamw")
    saver = Saver(plain)
    saver.begin(TrainerState(1, 8), tmp_path / "fresh", {})
    saver.writer.wait(60)
    load(engine(), newest_usable(tmp_path / "fresh")[0])
    step(plain)
    saver.begin(TrainerState(2, 16), tmp_path / "used", {})
    saver.writer.wait(60)
    with pytest.raises(CheckpointError, match="has an exp_avg_sq of .* saved by another optimizer than muon"):
        load(engine(), newest_usable(tmp_path / "used")[0])
