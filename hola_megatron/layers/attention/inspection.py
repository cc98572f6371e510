"""What a softmax attention layer reads (layers/inspection.py): every token, exactly; it has no state and no slots."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from hola_megatron.layers.inspection import LayerFacts


def facts(mixer: Any, hidden_BTD: Tensor, edges: Sequence[int], memory: Any) -> LayerFacts:
    return LayerFacts(local="all tokens before it and itself", heads=mixer.config.num_attention_heads)


def local_start(mixer: Any, position: int) -> int:
    return 0


def swaps(mixer: Any) -> dict[str, Any]:
    return {}


def swapped(mixer: Any, options: Any) -> AbstractContextManager[None]:
    return nullcontext()
