"""What state and kept tokens of a HAM layer did with a batch (layers/inspection.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hola_kernels.ham import ham_attention
from hola_megatron.layers.inspection import LayerFacts, between, state_norms


def facts(mixer: Any, hidden_BTD: Tensor, edges: Sequence[int], memory: Any) -> LayerFacts:
    """Norms of the state, routing scores, and what is kept."""
    tokens = mixer.tokens(hidden_BTD)
    _, keep, score = ham_attention(**tokens, gamma_q=mixer.gamma_q, gamma_k=mixer.gamma_k,
                                   threshold=mixer.controller.threshold, backend="torch")
    length = hidden_BTD.shape[1]
    ages = (length - torch.nonzero(keep)[:, 1]).tolist()
    return LayerFacts(local="itself alone", heads=mixer.num_value_heads,
                      gates=tokens["mix"][..., 1].double().sigmoid().mean((0, 1)).tolist(),
                      norms=state_norms(mixer, hidden_BTD, edges, memory), scores=between(score, edges),
                      kept=keep[0].sum(-1).tolist(), ages=ages)


def local_start(mixer: Any, position: int) -> int:
    return position


def swaps(mixer: Any) -> dict[str, Any]:
    return {}


def swapped(mixer: Any, options: Any) -> AbstractContextManager[None]:
    return nullcontext()
