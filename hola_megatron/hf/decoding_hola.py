"""One decoded token through all layers as a CUDA graph.

A token needs a few dozen launches a layer, each far shorter on the GPU than on the host. H and G layers
keep a constant number of bytes at fixed addresses and update them in place, so one recording serves every
token after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class DecodingGraph:
    """Calls `run`, which maps hidden [B, 1, D] to the same shape and updates memories in place; replays it later.

    The first token after the memories have been replaced (a prompt, beams put in another order) runs as it is, the
    second too, and is recorded then; from the third on the recording is replayed. So nothing is recorded where
    memories are replaced at every token. The weights must stay where they are meanwhile.
    """

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._held: list[Tensor] = []
        self._into = self._out = torch.empty(0)

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodingGraph, ()  # a copied cache has its own memories, and its own graph

    def __call__(self, run: Callable[[Tensor], Tensor], hidden_B1D: Tensor, held: Sequence[Tensor]) -> Tensor:
        """held: all tensors that `run` updates."""
        same = len(held) == len(self._held) and all(x is y for x, y in zip(held, self._held, strict=True))
        if not same:
            self._graph, self._held = None, list(held)
        elif self._graph is not None and self._into.dtype == hidden_B1D.dtype:
            self._into.copy_(hidden_B1D)
            self._graph.replay()
            return self._out.clone()
        out = run(hidden_B1D)
        if same:
            self._record(run, hidden_B1D)
        return out

    def _record(self, run: Callable[[Tensor], Tensor], hidden_B1D: Tensor) -> None:
        """Nothing runs meanwhile: the token's work has been done."""
        devices = {x.device for x in (hidden_B1D, *self._held)}
        if len(devices) > 1:
            raise ValueError(f"cuda_graph needs a model on one GPU, not on {', '.join(sorted(map(str, devices)))}; "
                             "leave it off")
        self._into, graph = hidden_B1D.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.device(hidden_B1D.device), torch.cuda.graph(graph):
            self._out = run(self._into)
        self._graph = graph
