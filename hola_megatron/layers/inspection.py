"""What the memory of one exported layer did with a batch of whole sequences, for tools/memory_report.py.

A kind with something to show has `inspection.py` in its folder, which `LayerKind.inspection` returns: a module with

    facts(mixer, hidden, edges, memory) -> LayerFacts
    local_start(mixer, position) -> int        the first token whose key a token reads exactly, slots not counted
    swaps(mixer) -> {name: options}            other exact caches that the layer can be given
    swapped(mixer, options)                    a context manager within which it has that one

The cache named ORACLE ranks tokens by scores that its caller gives (given_score.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

ORACLE = "oracle"
_OPERATION = "hola_kernels.attention"  # where the operations that it is composed of are called


@dataclass(frozen=True)
class LayerFacts:
    """Of one layer; None where it has no such thing. Means are over sequences and heads.

    local: the exact local part, in words. heads: of the layer.
    shares: of the softmax on each part, by its name. gates: the weight of the exact part, one a head.
    norms: the state's Frobenius norm at each edge (a position). scores: the mean score between the edges.
    kept: heads that hold each token of the first sequence exactly at its end, slots only. ages: in tokens, of all kept
    tokens of all sequences and heads then.
    """

    local: str
    heads: int
    shares: dict[str, float] | None = None
    gates: list[float] | None = None
    norms: list[float] | None = None
    scores: list[float] | None = None
    kept: list[int] | None = None
    ages: list[int] | None = None


def state_norms(mixer: Any, hidden_BTD: Tensor, edges: Sequence[int], memory: Any) -> list[float]:
    """The norm of the state at each edge (positions from 1 up, the last one the length); fills `memory`."""
    norms = []
    for first, end in pairwise([0, *edges]):
        mixer(hidden_BTD[:, first:end], None, memory)
        norms.append(float(_matrix(memory.state).double().norm(dim=(-2, -1)).mean()))
    return norms


def _matrix(state: Any) -> Tensor:
    """The matrices [N, H, K, V] of a decoding state."""
    return state if isinstance(state, Tensor) else _matrix(state.state)


def between(values_BTH: Tensor, edges: Sequence[int]) -> list[float]:
    """Means of [B, T, H] from one edge to the next."""
    return [float(values_BTH[:, first:end].double().mean()) for first, end in pairwise([0, *edges])]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the context, the attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def recorded_reads() -> Iterator[list[dict[str, Any]]]:
    """Within the context, the list collects the keywords of every read of an exact cache, layer by layer.

    Only operations that are composed read it by this function: those of the backend torch.
    """
    operation, reads = importlib.import_module(_OPERATION), []
    run = operation.exact_read_only

    def record(**keywords: Any) -> Tensor:
        reads.append({name: value for name, value in keywords.items() if name != "backend"})
        return run(**keywords)

    with replaced(operation, "exact_read_only", record):
        yield reads


def counted(positions_HW: Tensor, length: int) -> list[int]:
    """How many heads hold each position; -1 is an empty slot."""
    flat = positions_HW[positions_HW >= 0].cpu()
    return torch.bincount(flat, minlength=length)[:length].tolist()
