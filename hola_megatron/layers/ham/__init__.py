"""Hybrid associative memory (HAM, arXiv 2603.22325): Gated DeltaNet that also keeps the tokens it fails on exactly.

The state sees every token; a head keeps a token when its routing score reaches the layer's threshold, which follows a
wanted share of kept tokens. `hola_kernels.ham` has the formulas, `model.ham` the choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hola_megatron.layers.costs import Share, Term
from hola_megatron.layers.gdn import GatedDeltaNet
from hola_megatron.layers.gdn import costs as state_costs
from hola_megatron.layers.ham import costs
from hola_megatron.layers.initial import normal, ones, zeros
from hola_megatron.layers.spec import Parameter

if TYPE_CHECKING:
    from hola_megatron.layers.exported.kind_hola import ExportedKind
    from hola_megatron.layers.recipe_view import ModelConfig, Recipe

LAUNCHING = 1.8   # of runs whose micro-batches the host limits (docs/plan.md)
READ_TIME = 2.55  # a FLOP of the exact read takes so long beside one of the state: 13 % of a H200's peak, not 33 %


class Ham(GatedDeltaNet):
    """HAM (arXiv 2603.22325)."""

    name, letter = "ham", None
    summary = "HAM: Gated DeltaNet, and softmax attention to the tokens that it fails on"
    recipe_fields = ("heads", "key_dim", "value_dim", "conv_width", "rule", "beta_range", "ham")
    memory_grows = True
    fla_role = None
    time_part = "gates, merging and layout"

    def parameters(self, model: ModelConfig) -> tuple[Parameter, ...]:
        heads, inner = model.heads, model.ham.router_width

        def row(name: str, shape: tuple[int, ...], **how) -> Parameter:
            return Parameter(name, shape, stored_in=name, float32=True, part="exact_cache", **how)

        rows = [row("gamma_q", (model.key_dim,), partition_dim=None, init=ones),
                row("gamma_k", (model.key_dim,), partition_dim=None, init=ones)]
        if model.ham.router == "learned":
            rows += [row("route_out", (heads, inner), init=normal), row("route_bias", (heads,), init=zeros)]
        return (*super().parameters(model), *rows)

    def further_projections(self, model: ModelConfig) -> dict[str, int]:
        route = {"route": model.heads * model.ham.router_width} if model.ham.router == "learned" else {}
        return {"mix": 2 * model.heads, **route}

    def states(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        return {"controller.threshold": (1,), "controller.updates": (1,)}

    def mixer(self) -> type:
        from hola_megatron.layers.ham.mixer import HamMixer

        return HamMixer

    def exported(self) -> ExportedKind:
        from hola_megatron.layers.ham.export import KIND

        return KIND

    def forward_flops(self, model: ModelConfig, length: int) -> float:
        return super().forward_flops(model, length) + costs.read_flops(model, length)

    def saved(self, share: Share) -> list[Term]:
        return [*state_costs.saved(share, self), *costs.read_saved(share, self)]

    def timed_flops(self, model: ModelConfig, length: int) -> float:
        return super().forward_flops(model, length) + READ_TIME * costs.read_flops(model, length)

    def launching(self, recipe: Recipe) -> float:
        return LAUNCHING

    def speed_note(self, recipe: Recipe) -> str | None:
        return "ham layers with a cosine router" if recipe.model.ham.router == "cosine" else None

    def workspace(self, share: Share) -> float:
        return max(state_costs.workspace(share, self), costs.read_workspace(share, self))

    def check_sizes(self, recipe: Recipe) -> Iterator[str]:
        yield from super().check_sizes(recipe)
        if recipe.parallel.context > 1:
            yield (f"parallel.context: {recipe.parallel.context} is not possible with ham layers, whose kept tokens "
                   "would have to come from every rank; set it to 1")

    def check_state_delay(self, recipe: Recipe) -> Iterator[str]:
        """HAM layers have none."""
        if recipe.model.state_delay:
            yield (f"model.state_delay: {recipe.model.state_delay} is for gdn and hola layers; set it to 0 with ham "
                   "layers")

    def check_cuda_graph(self, recipe: Recipe) -> Iterator[str]:
        yield ("train.cuda_graph: true is not possible with ham layers, which keep another number of tokens in every "
               "step; set it to false")

    def card_text(self, config: dict[str, Any]) -> str:
        return (f"A HAM layer keeps about {100 * config['ham_share']:g} % of all tokens per head exactly, by a "
                f"{config['ham_router']} score; its memory grows with the text. ")

    def fla_problem(self, model: ModelConfig) -> str | None:
        return f"model.pattern: {model.pattern} has {self.name} layers; the comparison takes hola and gdn"

    def timed_functions(self) -> Iterator[tuple[str, str, str]]:
        from hola_megatron.layers.ham.timing import timed_functions

        yield from super().timed_functions()
        yield from timed_functions()

    def health(self) -> ModuleType:
        from hola_megatron.layers.ham import health

        return health

    def inspection(self) -> ModuleType:
        from hola_megatron.layers.ham import inspection

        return inspection


HAM = Ham()
