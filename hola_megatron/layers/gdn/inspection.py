"""What the state of a Gated DeltaNet layer did with a batch (layers/inspection.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from hola_kernels import gated_delta_rule
from hola_megatron.layers.inspection import LayerFacts, between, state_norms


def facts(mixer: Any, hidden_BTD: Tensor, edges: Sequence[int], memory: Any) -> LayerFacts:
    """Norms of the state, and scores: the size of what each token writes."""
    _, written, _ = gated_delta_rule(**mixer.tokens(hidden_BTD), backend=mixer.backend)
    return LayerFacts(local="none: a token reads the state alone", heads=mixer.num_value_heads,
                      norms=state_norms(mixer, hidden_BTD, edges, memory), scores=between(written, edges))


def local_start(mixer: Any, position: int) -> int:
    return position + 1


def swaps(mixer: Any) -> dict[str, Any]:
    return {}


def swapped(mixer: Any, options: Any) -> AbstractContextManager[None]:
    return nullcontext()
