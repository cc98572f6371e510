"""Hybrid quadratic-linear attention (HQLT, arXiv 2506.00744): a delta-rule state and a softmax window in one layer.

Both memories take the same q, k and v. `hola_kernels.hqlt` has the formulas, `model.hqlt` the choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hola_megatron.layers.costs import Share, Term
from hola_megatron.layers.gdn.limits import KERNEL_WIDTHS
from hola_megatron.layers.hqlt import costs
from hola_megatron.layers.initial import ones
from hola_megatron.layers.spec import LayerKind, Parameter

if TYPE_CHECKING:
    from hola_megatron.layers.exported.kind_hola import ExportedKind
    from hola_megatron.layers.recipe_view import ModelConfig, Recipe


class Hqlt(LayerKind):
    """HQLT (arXiv 2506.00744)."""

    name = "hqlt"
    summary = "HQLT: a delta-rule state and a softmax window"
    recipe_fields = ("heads", "key_dim", "value_dim", "beta_range", "hqlt")
    time_part = "mixing and layout"

    def parameters(self, model: ModelConfig) -> tuple[Parameter, ...]:
        width, heads = model.hidden_size, model.heads
        key, value = heads * model.key_dim, heads * model.value_dim
        mixing = {"sum": {}, "scalar": {"mix": 2 * heads}, "vector": {"mix": value}}[model.hqlt.mixing]
        rows = [Parameter(f"{name}_proj.weight", (size, width), stored_in="in_proj.weight", muon="heads")
                for name, size in {"q": key, "k": key, "v": value, **mixing, "b": heads}.items()]
        rows += [Parameter("o_norm.weight", (model.value_dim,), stored_in="o_norm", partition_dim=None, init=ones),
                 Parameter("o_proj.weight", (width, value), stored_in="out_proj.weight", partition_dim=1, muon="whole")]
        return tuple(rows)

    def mixer(self) -> type:
        from hola_megatron.layers.hqlt.mixer import HqltMixer

        return HqltMixer

    def inspection(self) -> ModuleType:
        from hola_megatron.layers.hqlt import inspection

        return inspection

    def exported(self) -> ExportedKind:
        from hola_megatron.layers.hqlt.export import KIND

        return KIND

    def heads(self, model: ModelConfig) -> int:
        return model.heads

    def head_width(self, model: ModelConfig) -> int:
        return model.key_dim

    def forward_flops(self, model: ModelConfig, length: int) -> float:
        return costs.forward_flops(model, length)

    def saved(self, share: Share) -> list[Term]:
        return costs.saved(share, self)

    def speed_note(self, recipe: Recipe) -> str | None:
        if recipe.model.hqlt.blend == "sync":
            return None
        return ("hqlt layers whose state is late (runs were 11 and 19 % slower than predicted, stream and chunk, "
                "before gradients of moved rows were gathered)")

    def workspace(self, share: Share) -> float:
        return costs.workspace(share, self)

    def check_sizes(self, recipe: Recipe) -> Iterator[str]:
        model, parallel = recipe.model, recipe.parallel
        if model.heads % parallel.tensor:
            yield (f"model.heads: {model.heads} is not a multiple of {parallel.tensor} (parallel.tensor = "
                   f"{parallel.tensor} cuts heads)")
        if model.rule == "none":
            yield ("model.rule: none is for hola layers, and hqlt layers read a state; leave it out, or set "
                   "model.pattern to H, W and A without hqlt")
        if model.key_dim % 2:
            yield f"model.key_dim: {model.key_dim} is odd, and hqlt layers rotate pairs of channels; make it even"
        if parallel.context > 1:
            yield (f"parallel.context: {parallel.context} is not possible with hqlt layers, whose window and delayed "
                   "state are not cut over ranks; set it to 1")

    def check_cuda_graph(self, recipe: Recipe) -> Iterator[str]:
        yield "train.cuda_graph: true is not possible with hqlt layers; set it to false"

    def fp8_widths(self, model: ModelConfig) -> list[tuple[str, int]]:
        return [("model.heads x model.value_dim", model.heads * model.value_dim)]

    def kernel_problem(self, model: ModelConfig) -> str | None:
        if model.key_dim not in KERNEL_WIDTHS or model.value_dim not in KERNEL_WIDTHS:
            return f"key_dim {model.key_dim} or value_dim {model.value_dim} is not one of 64, 128, 256"
        return None

    def card_text(self, config: dict[str, Any]) -> str:
        return (f"An HQLT layer ({config['hqlt_blend']}) reads a delta-rule state and the last {config['hqlt_window']} "
                f"tokens, joined by `{config['hqlt_mixing']}`. ")

    def telling_length(self, model: ModelConfig) -> int:
        return 2 * model.hqlt.window + 17

    def timed_functions(self) -> Iterator[tuple[str, str, str]]:
        yield "hola_kernels.hqlt", "delayed_delta_rule", "state"
        yield "hola_kernels.hqlt", "_read_window", "softmax window"
        yield "hola_megatron.layers.hqlt.mixer", "hqlt_attention", "SiLU and mixing"
        yield "hola_megatron.layers.hqlt.mixer", "rms_norm", "output norm"


HQLT = Hqlt()
