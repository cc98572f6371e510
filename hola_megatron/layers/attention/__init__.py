"""Causal softmax attention with rotary positions: the layers of a Transformer++, and of hybrids.

Key heads may be fewer than query heads (grouped queries), and queries and keys may be normed per head before they are
rotated.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from hola_megatron.layers.attention import costs
from hola_megatron.layers.attention.limits import FLASH_MULTIPLE, FLASH_WIDTH
from hola_megatron.layers.costs import Share, Term
from hola_megatron.layers.initial import ones
from hola_megatron.layers.spec import LayerKind, Parameter

if TYPE_CHECKING:
    from hola_megatron.layers.exported.kind_hola import ExportedKind
    from hola_megatron.layers.recipe_view import ModelConfig, Recipe


class Attention(LayerKind):
    """Softmax attention with rotary positions."""

    """Softmax attention with rotary positions."""

    name, letter = "attention", "A"
    summary = "softmax attention: with rotary positions"
    recipe_fields = ("attention_heads", "attention_kv_heads", "attention_qk_norm", "rope_theta")
    memory_grows = True
    fla_role = "softmax"
    time_part = "softmax attention"

    def parameters(self, model: ModelConfig) -> tuple[Parameter, ...]:
        width, keys = model.hidden_size, costs.kv_heads(model) * self.head_width(model)
        rows = [Parameter("q_proj.weight", (width, width), stored_in="in_proj.weight", muon="heads"),
                *(Parameter(f"{name}_proj.weight", (keys, width), stored_in="in_proj.weight", muon="heads",
                            heads=costs.kv_heads(model)) for name in "kv")]
        if model.attention_qk_norm:
            rows += [Parameter(f"{name}_norm.weight", (self.head_width(model),), stored_in=f"{name}_norm",
                               partition_dim=None, init=ones) for name in "qk"]
        return (*rows, Parameter("o_proj.weight", (width, width), stored_in="out_proj.weight", partition_dim=1,
                                 muon="whole"))

    def mixer(self) -> type:
        from hola_megatron.layers.attention.mixer import AttentionMixer

        return AttentionMixer

    def inspection(self) -> ModuleType:
        from hola_megatron.layers.attention import inspection

        return inspection

    def exported(self) -> ExportedKind:
        from hola_megatron.layers.attention.export import KIND

        return KIND

    def heads(self, model: ModelConfig) -> int:
        return model.attention_heads

    def head_width(self, model: ModelConfig) -> int:
        return model.hidden_size // model.attention_heads

    def window(self, model: ModelConfig) -> int | None:
        """Tokens that a token sees, itself included; None: its whole document."""
        return None

    def forward_flops(self, model: ModelConfig, length: int) -> float:
        return costs.forward_flops(model, length, self.window(model))

    def saved(self, share: Share) -> list[Term]:
        return costs.saved(share, self, self.window(share.recipe.model))

    def speed_note(self, recipe: Recipe) -> str | None:
        return None

    def workspace(self, share: Share) -> float:
        return costs.workspace(share, self)

    def check_sizes(self, recipe: Recipe) -> Iterator[str]:
        model, ranks = recipe.model, recipe.parallel.tensor
        heads, keys, width = model.attention_heads, costs.kv_heads(model), model.hidden_size
        if heads % ranks:
            yield (f"model.attention_heads: {heads} is not a multiple of {ranks} "
                   f"(parallel.tensor = {ranks} shards heads)")
        if heads % keys:
            yield f"model.attention_kv_heads: {keys} does not divide model.attention_heads = {heads}"
        elif keys % ranks and not heads % ranks:
            yield (f"model.attention_kv_heads: {keys} is not a multiple of {ranks} (parallel.tensor = {ranks} shards "
                   "heads)")
        if width % (2 * heads):
            yield (f"model.hidden_size: {width} is not a multiple of {2 * heads} "
                   "(an attention head's width must be even)")

    def check_cuda_graph(self, recipe: Recipe) -> Iterator[str]:
        """Rows of equal length need nothing; documents, and windows, need flash attention."""
        model, width = recipe.model, self.head_width(recipe.model)
        if recipe.data.documents != "separate" and self.window(model) is None:
            return
        if recipe.train.precision != "bf16" or model.backend not in ("auto", "triton"):
            yield (f"train.cuda_graph: true needs train.precision of bf16 and model.backend of auto or triton where "
                   f"{self.title} keeps documents or a window; set these, or train.cuda_graph to false")
        if width % FLASH_MULTIPLE or width > FLASH_WIDTH:
            yield (f"train.cuda_graph: true needs attention heads of a multiple of {FLASH_MULTIPLE} up to "
                   f"{FLASH_WIDTH}, and model.hidden_size / model.attention_heads is {width}; change it, or set "
                   "train.cuda_graph to false")

    def fp8_widths(self, model: ModelConfig) -> list[tuple[str, int]]:
        return [("model.hidden_size", model.hidden_size)]


ATTENTION = Attention()
