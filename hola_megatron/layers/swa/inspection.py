"""What a layer of softmax attention in a sliding window reads (layers/inspection.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hola_megatron.layers.attention.inspection import swapped, swaps
from hola_megatron.layers.inspection import LayerFacts

__all__ = ["facts", "local_start", "swapped", "swaps"]


def facts(mixer: Any, hidden_BTD: Tensor, edges: Sequence[int], memory: Any) -> LayerFacts:
    config = mixer.config
    return LayerFacts(local=f"a sliding window of {config.attention_window} tokens", heads=config.num_attention_heads)


def local_start(mixer: Any, position: int) -> int:
    return max(0, position + 1 - mixer.config.attention_window)
