"""What state and window of an HQLT layer did with a batch (layers/inspection.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from hola_megatron.layers.inspection import LayerFacts, state_norms


def facts(mixer: Any, hidden_BTD: Tensor, edges: Sequence[int], memory: Any) -> LayerFacts:
    window, config = mixer.config.hqlt_window, mixer.config
    local = f"its chunk of {window} tokens up to itself" if _is_chunked(config) else f"a window of {window} tokens"
    return LayerFacts(local=local, heads=config.num_heads, norms=state_norms(mixer, hidden_BTD, edges, memory))


def _is_chunked(config: Any) -> bool:
    return config.hqlt_blend == "delayed_chunk"


def local_start(mixer: Any, position: int) -> int:
    window = mixer.config.hqlt_window
    return position // window * window if _is_chunked(mixer.config) else max(0, position + 1 - window)


def swaps(mixer: Any) -> dict[str, Any]:
    return {}


def swapped(mixer: Any, options: Any) -> AbstractContextManager[None]:
    return nullcontext()
