"""A layer kind that the project does not have: what adding one takes. A decaying mean of values per head, gated.

    h_t = a h_{t-1} + (1 - a) v_t,  a = sigmoid(rate) per head        y = W_o (h * sigmoid(gate))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hola_megatron.layers.costs import Share, Term
from hola_megatron.layers.initial import zeros
from hola_megatron.layers.spec import LayerKind, Parameter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hola_megatron.config import ModelConfig, Recipe


class Toy(LayerKind):
    name = "toy"
    summary = "a decaying mean, for tests"
    recipe_fields = ("heads", "value_dim")
    time_part = "decaying mean"

    def parameters(self, model: ModelConfig) -> tuple[Parameter, ...]:
        width, value = model.hidden_size, model.heads * model.value_dim
        return (Parameter("v_proj.weight", (value, width), stored_in="in_proj.weight", muon="heads"),
                Parameter("g_proj.weight", (value, width), stored_in="in_proj.weight", muon="heads"),
                Parameter("rate", (model.heads,), stored_in="rate", init=zeros, float32=True),
                Parameter("o_proj.weight", (width, value), stored_in="out_proj.weight", partition_dim=1, muon="whole"))

    def mixer(self) -> type:
        from layers.toy.mixer import ToyMixer

        return ToyMixer

    def exported(self):
        from layers.toy.export import KIND

        return KIND

    def heads(self, model: ModelConfig) -> int:
        return model.heads

    def head_width(self, model: ModelConfig) -> int:
        return model.value_dim

    def forward_flops(self, model: ModelConfig, length: int) -> float:
        return 3 * model.heads * model.value_dim

    def saved(self, share: Share) -> list[Term]:
        return [Term("activations", "fused projection v gate", share.tokens * share.projection(self) * share.number)]

    def workspace(self, share: Share) -> float:
        return share.tokens * share.projection(self) * share.number

    def check_sizes(self, recipe: Recipe) -> Iterator[str]:
        if recipe.model.heads % recipe.parallel.tensor:
            yield f"model.heads: {recipe.model.heads} is not a multiple of {recipe.parallel.tensor}"
        if recipe.parallel.context > 1:
            yield "parallel.context: toy layers are not cut over ranks; set it to 1"


TOY = Toy()


def register() -> None:
    """The one line that a kind takes in hola_megatron/layers/registry.py, for this process."""
    from hola_megatron.layers.registry import KINDS

    KINDS[TOY.name] = TOY
