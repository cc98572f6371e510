"""What the state of a Gated DeltaProduct layer did with a batch (layers/inspection.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hola_megatron.layers.gdn.inspection import local_start, swapped, swaps
from hola_megatron.layers.inspection import LayerFacts, state_norms

__all__ = ["facts", "local_start", "swapped", "swaps"]


def facts(mixer: Any, hidden_BTD: Tensor, edges: Sequence[int], memory: Any) -> LayerFacts:
    """Norms of the state."""
    return LayerFacts(local="none: a token reads the state alone", heads=mixer.num_value_heads,
                      norms=state_norms(mixer, hidden_BTD, edges, memory))
