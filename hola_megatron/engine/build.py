"""The engine that a recipe names."""

from __future__ import annotations

from hola_megatron.engine.base import Engine
from hola_megatron.parallel.groups import Layout
from hola_megatron.recipe.schema import Recipe


def build_engine(recipe: Recipe, layout: Layout) -> Engine:
    """The engine that the recipe names."""
    if recipe.engine == "deepspeed":
        from hola_megatron.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(recipe, layout)
    from hola_megatron.engine.megatron import MegatronEngine

    return MegatronEngine(recipe, layout)
