"""Parameters from arithmetic against the model that is built, without storage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hola_megatron.config import Recipe, load_recipe
from hola_megatron.layers.padding import projection_rows
from hola_megatron.plan.parameters import parameters_by_part, rank_parameters
from hola_megatron.startup.start import start

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.yaml"))
TINY = RECIPES[0].parent / "hola_tiny.yaml"
CHANGES = [[], ["model.rule=delta"], ["model.rule=none", "model.cache.score=betav"],
           ["model.rule=none", "model.cache.score=learned"],
           ["model.cache.sink=false"], ["model.pattern=HGA", "model.attention_heads=4"],
           ["model.pattern=AW", "model.attention_heads=4", "model.attention_kv_heads=2",
            "model.attention_qk_norm=true"],
           ["model.pattern=hqlt"], ["model.pattern=hqlt", "model.hqlt.mixing=scalar", "model.value_dim=32"],
           ["model.pattern=hqlt", "model.hqlt.mixing=sum"], ["model.pattern=ham", "model.ham.router_width=24"],
           ["model.pattern=ham", "model.ham.router=cosine", "model.rule=delta"],
           ["model.pattern=deltaproduct", "model.delta_steps=3"],
           ["model.cache.score=learned", "model.cache.merge=convex", "model.value_dim=32"],
           ["model.tie_embeddings=false", "model.value_dim=32"]]


def alone(recipe: Recipe) -> Recipe:
    """The same model on one rank: what parameters a model has does not depend on its layout."""
    parallel = dataclasses.replace(recipe.parallel, tensor=1, pipeline=1, context=1, sequence=False)
    return dataclasses.replace(recipe, parallel=parallel)


def built(recipe: Recipe) -> list[torch.nn.Module]:
    from hola_megatron.model.build import build_model

    start(alone(load_recipe(TINY)))
    return build_model(alone(recipe), device=torch.device("meta"))


def padding(recipe: Recipe, ranks: int) -> int:
    """Numbers of one rank that fill every fused projection up to rows of 64."""
    rows = [projection_rows(kind, recipe.model, ranks) for kind in recipe.model.layer_kinds]
    return sum((64 - n % 64) % 64 for n in rows) * recipe.model.hidden_size


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_has_the_parameters_of_its_built_model(path):
    from hola_megatron.model.build import count_parameters

    recipe = load_recipe(path)
    found = count_parameters(built(recipe))
    assert {part: size for part, size in parameters_by_part(recipe.model).items() if size} == found


@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: " ".join(c) or "as it is")
def test_every_choice_of_the_model_is_counted(changes):
    from hola_megatron.model.build import count_parameters

    recipe = load_recipe(TINY, changes)
    assert {part: size for part, size in parameters_by_part(recipe.model).items() if size} == \
        count_parameters(built(recipe))


@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: " ".join(c) or "as it is")
def test_one_rank_holds_everything_and_two_what_is_cut_only_once(changes):
    """Replicated numbers are those of the built model that Megatron does not mark as tensor parallel."""
    recipe = load_recipe(TINY, [*changes, "train.precision=bf16"])
    parameters = [p for chunk in built(recipe) for p in chunk.parameters()]
    whole = rank_parameters(recipe, 0)
    assert whole.total == sum(p.numel() for p in parameters)
    assert whole.float32 == sum(p.numel() for p in parameters if p.dtype == torch.float32)
    replicated = sum(p.numel() for p in parameters if not getattr(p, "tensor_model_parallel", False))
    half = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, tensor=2))
    logical = rank_parameters(half, 0).total - padding(recipe, 2), whole.total - padding(recipe, 1)
    assert 2 * logical[0] - logical[1] == replicated


def test_stages_share_the_layers_and_a_tied_embedding_is_held_twice():
    recipe = load_recipe(TINY, ["parallel.pipeline=4"])
    table = recipe.model.vocab_size * recipe.model.hidden_size
    total = parameters_by_part(recipe.model)["total"]
    padded = padding(recipe, 1)
    assert padded > 0
    assert sum(rank_parameters(recipe, stage).total for stage in range(4)) == total + table + padded
    untied = load_recipe(TINY, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.tie_embeddings=false"])
    assert sum(rank_parameters(untied, stage).total for stage in range(2)) == total + table + padded
