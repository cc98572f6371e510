"""Gated DeltaProduct (arXiv 2502.10297): Gated DeltaNet with several writes to the state for every token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

from hola_megatron.layers.costs import Share, Term
from hola_megatron.layers.deltaproduct import costs
from hola_megatron.layers.gdn import GatedDeltaNet
from hola_megatron.layers.spec import Parameter

if TYPE_CHECKING:
    from hola_megatron.layers.exported.kind_hola import ExportedKind
    from hola_megatron.layers.recipe_view import ModelConfig, Recipe

WRITTEN = ("k_proj.weight", "v_proj.weight", "b_proj.weight", "k_conv.weight", "v_conv.weight")  # rows for every write


class DeltaProduct(GatedDeltaNet):
    """Gated DeltaProduct (arXiv 2502.10297)."""

    name, letter = "deltaproduct", None
    summary = "Gated DeltaProduct: Gated DeltaNet with several writes a token"
    recipe_fields = ("heads", "key_dim", "value_dim", "conv_width", "rule", "beta_range", "delta_steps")
    fla_role = None

    def parameters(self, model: ModelConfig) -> tuple[Parameter, ...]:
        return tuple(replace(row, shape=(model.delta_steps * row.shape[0], *row.shape[1:])) if row.name in WRITTEN
                     else row for row in super().parameters(model))

    def mixer(self) -> type:
        from hola_megatron.layers.deltaproduct.mixer import DeltaProductMixer

        return DeltaProductMixer

    def exported(self) -> ExportedKind:
        from hola_megatron.layers.deltaproduct.export import KIND

        return KIND

    def inspection(self) -> ModuleType:
        from hola_megatron.layers.deltaproduct import inspection

        return inspection

    def forward_flops(self, model: ModelConfig, length: int) -> float:
        return costs.forward_flops(model)

    def saved(self, share: Share) -> list[Term]:
        return costs.saved(share, self)

    def workspace(self, share: Share) -> float:
        return costs.workspace(share, self)

    def check_state_delay(self, recipe: Recipe) -> Iterator[str]:
        """The state is not delayed, and not exchanged between context ranks."""
        model = recipe.model
        if model.state_delay and not any("state_delay" in kind.recipe_fields for kind in model.layer_kinds):
            yield (f"model.state_delay: {model.state_delay} is for gdn and hola layers; set it to 0 with deltaproduct "
                   "layers")
        if recipe.parallel.context > 1:
            yield f"parallel.context: {recipe.parallel.context} is not possible with deltaproduct layers; set it to 1"

    def check_cuda_graph(self, recipe: Recipe) -> Iterator[str]:
        yield "train.cuda_graph: true is not possible with deltaproduct layers; set it to false"

    def fla_problem(self, model: ModelConfig) -> str | None:
        return "deltaproduct layers; the comparison takes hola and gdn"

    def timed_functions(self) -> Iterator[tuple[str, str, str]]:
        parts = {"gated_delta_product": "state", "short_conv": "convolution", "decay_and_strength": "gates and layout",
                 "gated_rms_norm": "output norm"}
        for name, part in parts.items():
            yield "hola_megatron.layers.deltaproduct.mixer", name, part


DELTAPRODUCT = DeltaProduct()
