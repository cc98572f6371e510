"""Layers with experts: sizes, work, what is refused, and the balance that is no parameter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import MICRO

from hola_megatron.config import Recipe, build_recipe, load_recipe
from hola_megatron.errors import CheckpointError, RecipeError
from hola_megatron.model.flops import matmul_parameters
from hola_megatron.plan.memory import _standing
from hola_megatron.plan.parameters import active_parameters, parameters_by_part, rank_parameters
from hola_megatron.recipe.checks import check_recipe
from hola_megatron.startup.start import start

RECIPES = Path(__file__).parent.parent.parent / "recipes"
SHIPPED = RECIPES / "hola_moe_7b_a1b.yaml"


def recipe(moe: dict, **parallel: object) -> Recipe:
    return build_recipe({**MICRO, "model": {**MICRO["model"], "moe": {"experts": 4, "hidden_size": 32, **moe}},
                         "parallel": parallel})


def engine_of(made: Recipe):
    from hola_megatron.engine.megatron import MegatronEngine

    return MegatronEngine(made, start(made))


def step(engine, made: Recipe, **arguments: object):
    from hola_megatron.profile.profiler import _synthetic

    return engine.train_step(_synthetic(made, engine.layout), 1e-2, **arguments)


def test_the_shipped_model_is_the_one_its_name_says():
    from hola_megatron.model.build import build_model, count_parameters

    shipped = load_recipe(SHIPPED, ["parallel.expert=1"])
    start(shipped)
    counts = parameters_by_part(shipped.model)
    assert count_parameters(build_model(shipped, device=torch.device("meta"))) == {k: n for k, n in counts.items() if n}
    assert counts["total"] == pytest.approx(7e9, rel=0.03)
    assert active_parameters(shipped.model) == pytest.approx(1.2e9, rel=0.03)


def test_work_is_that_of_the_chosen_experts():
    """The weights a token is multiplied with, counted in the built model: the router, and 3 of 4 experts."""
    from hola_megatron.model.build import build_model
    from hola_megatron.model.parameters import param_shards

    made = recipe({"top_k": 3})
    start(made)
    built = param_shards(build_model(made, device=torch.device("meta")), 0, 1)
    products = {p.name: p.shape[0] * p.shape[1] for p in built if len(p.shape) == 2 and "_conv" not in p.name}
    idle = sum(size for name, size in products.items() if ".experts.3." in name)
    assert idle == made.model.layers * 3 * 32 * 32 and any(name.endswith("mlp.router.weight") for name in products)
    assert matmul_parameters(made.model) == sum(products.values()) - idle
    assert active_parameters(made.model) == parameters_by_part(made.model)["total"] - idle


def test_a_rank_holds_its_share_of_experts():
    whole, half = recipe({}), recipe({}, expert=2)
    experts = 4 * 4 * 3 * 32 * 32  # layers, experts, linears
    assert rank_parameters(whole, 0).experts == experts and rank_parameters(half, 0).experts == experts // 2
    assert rank_parameters(whole, 0).total - rank_parameters(half, 0).total == experts // 2
    # float32 training: 8 bytes a parameter, everything over both data ranks, the experts over those with the same ones
    common = rank_parameters(whole, 0).total - experts
    assert _standing(whole, 2, 0)["optimizer"] == 8 * (common + experts) / 2
    assert _standing(half, 2, 0)["optimizer"] == 8 * common / 2 + 8 * experts / 2


@pytest.mark.parametrize(("moe", "parallel", "said"), [
    ({"top_k": 5}, {}, "model.moe.top_k: 5 is more than model.moe.experts = 4"),
    ({}, {"expert": 3}, "model.moe.experts: 4 is not a multiple of 3"),
    ({}, {"tensor": 2}, "parallel.sequence: false, and experts on parallel.tensor = 2"),
    ({"experts": None}, {}, "model.moe.hidden_size: 32 is given, and model.moe.experts is null"),
    ({"experts": None, "hidden_size": None}, {"expert": 2}, "parallel.expert: 2 ranks share experts"),
    ({"experts": 1}, {}, "model.moe.experts: 1 is not allowed"),
    ({"balancing": "luck"}, {}, "model.moe.balancing: 'luck' is not allowed"),
])
def test_what_does_not_fit_is_named(moe, parallel, said):
    with pytest.raises(RecipeError) as told:
        recipe(moe, **parallel)
    assert any(said in problem for problem in told.value.problems), told.value.problems


def test_expert_ranks_must_divide_a_stage():
    made = recipe({}, expert=4)
    assert check_recipe(made, world_size=4) == []
    assert "parallel.expert: 4 does not divide the 2 ranks" in check_recipe(made, world_size=2)[0]


def test_fp8_and_muon_are_refused():
    for section, said in (({"fp8": {"recipe": "current"}}, "fp8.recipe: current is not possible with model.moe"),
                          ({"train": {**MICRO["train"], "optimizer": "muon"}}, "muon is not possible with model.moe")):
        with pytest.raises(RecipeError) as told:
            build_recipe({**MICRO, "model": {**MICRO["model"], "moe": {"experts": 4}}, **section})
        assert any(said in problem for problem in told.value.problems), told.value.problems


def test_export_is_refused():
    from hola_megatron.hf.shape import config_of

    with pytest.raises(CheckpointError, match=r"model.moe.experts: 4: models with experts have no exported form"):
        config_of(recipe({}))


def test_the_balancing_loss_reaches_the_router():
    gradients = {}
    for weight in (0.0, 1.0):
        made = recipe({"aux_loss_weight": weight})
        engine = engine_of(made)
        step(engine, made)
        layer = engine.model[0].module.decoder.layers[0]
        gradients[weight] = layer.mlp.router.weight.main_grad.clone()
    assert (gradients[1.0] - gradients[0.0]).norm() > 0.01 * gradients[0.0].norm() > 0


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_balancing_loss_has_its_weight_whatever_share_of_tokens_has_a_loss(recompute):
    """What it adds to the router's gradient does not depend on how many labels count."""
    from hola_megatron.profile.profiler import _synthetic

    added = {}
    for share in (1.0, 0.25):
        gradients = {}
        for weight in (0.0, 1.0):
            made = dataclasses.replace(recipe({"aux_loss_weight": weight}))
            made = dataclasses.replace(made, train=dataclasses.replace(made.train, recompute=recompute))
            engine = engine_of(made)
            batches = []
            for number, batch in enumerate(_synthetic(made, engine.layout)):
                mask = torch.ones_like(batch.loss_mask)
                if share < 1:
                    mask[:, int(share * mask.shape[1]) + number:] = 0  # not alike in all micro-batches
                batches.append(dataclasses.replace(batch, loss_mask=mask))
            engine.train_step(batches, 0.0, judge=lambda loss, norm: "only gradients")
            gradients[weight] = engine.model[0].module.decoder.layers[0].mlp.router.weight.main_grad.clone()
        added[share] = gradients[1.0] - gradients[0.0]
    assert added[1.0].norm() > 1e-3
    assert (added[0.25] - added[1.0]).norm() < 1e-3 * added[1.0].norm()


def test_the_bias_follows_the_experts_use_and_not_a_refused_step():
    made = recipe({"balancing": "bias", "bias_rate": 0.5})
    engine = engine_of(made)
    step(engine, made)
    after_one = {name: bias.clone() for name, bias in engine.router_biases().items()}
    assert len(after_one) == 4 and all(bias.abs().max() > 0 for bias in after_one.values())
    weights = [p.detach().clone() for p in engine.model[0].parameters()]
    assert step(engine, made, judge=lambda loss, norm: "no").problem == "no"
    assert all(after_one[name].equal(bias) for name, bias in engine.router_biases().items())
    assert all(a.equal(b) for a, b in zip(weights, engine.model[0].parameters(), strict=True))
    step(engine, made)
    assert not all(after_one[name].equal(bias) for name, bias in engine.router_biases().items())


def test_without_experts_nothing_is_kept_of_them():
    made = build_recipe(MICRO)
    engine = engine_of(dataclasses.replace(made))
    assert engine.router_biases() == {}


@pytest.mark.parametrize("balancing", ["aux_loss", "bias"])
def test_the_scale_that_an_earlier_model_left_is_not_used(balancing):
    """Megatron holds it in a class, in the shape and on the device of the first."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    made = recipe({"balancing": balancing})
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(7.0)  # of a backward pass without an engine: no axis
    assert step(engine_of(made), made).updated
    assert MoEAuxLossAutoScaler.main_loss_backward_scale.shape == (1,)
