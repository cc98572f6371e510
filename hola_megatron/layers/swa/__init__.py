"""Softmax attention in a sliding window: every token sees the last `model.attention_window` tokens of its document,
itself included. Memory and work of a token are bounded, whatever the document's length.

Everything else is as in softmax attention: grouped queries, norms, rotary positions.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from hola_megatron.layers.attention import Attention

if TYPE_CHECKING:
    from hola_megatron.layers.exported.kind_hola import ExportedKind
    from hola_megatron.layers.recipe_view import ModelConfig, Recipe

TELLING = 1024  # of a wider window, this many tokens are compared after an export


class SlidingWindowAttention(Attention):
    name, letter = "swa", "W"
    summary = "sliding-window attention: softmax attention to the last tokens, with rotary positions"
    recipe_fields = (*Attention.recipe_fields, "attention_window")
    memory_grows = False
    fla_role = None
    time_part = "sliding-window attention"

    def speed_note(self, recipe: Recipe) -> str | None:
        return f"{self.name} layers"

    def window(self, model: ModelConfig) -> int:
        return model.attention_window

    def inspection(self) -> ModuleType:
        from hola_megatron.layers.swa import inspection

        return inspection

    def exported(self) -> ExportedKind:
        from hola_megatron.layers.swa.export import KIND

        return KIND

    def least_tokens(self, model: ModelConfig) -> int:
        """A window spans two ranks at most."""
        return max(1, model.attention_window - 1)

    def card_text(self, config: dict[str, Any]) -> str:
        return f"A sliding-window attention layer sees the last {config['attention_window']} tokens. "

    def telling_length(self, model: ModelConfig) -> int:
        return max(80, min(model.attention_window, TELLING) + 17)


SWA = SlidingWindowAttention()
