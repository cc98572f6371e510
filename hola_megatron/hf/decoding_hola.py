"""One decoded token through all layers as a CUDA graph.

A token needs a few dozen kernel launches per layer, each far shorter on the GPU than on the host. H and G layers have a
state of constant size at fixed addresses and update it in place, so one captured graph serves all later tokens.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_capture_lock = threading.Lock()
_logger = logging.getLogger(__name__)


class DecodingGraph:
    """Calls `run`, which maps hidden [B, 1, D] to the same shape and updates states in place; later replays a graph.

    The first token after a change (a prompt, reordered beams, another batch) runs eagerly; the second runs eagerly and
    is captured; from the third on the graph is replayed. So nothing is captured where states are replaced at every
    token. A failed capture is logged once, and tokens then run eagerly.
    """

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tensors: list[weakref.ref[Tensor]] = []  # tensors of the graph; only the cache keeps them alive
        self._key: Hashable = None
        self._failed = False
        self._into = self._out = torch.empty(0)

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodingGraph, ()  # a copied cache has its own tensors, and its own graph

    def __call__(self, run: Callable[[Tensor], Tensor], hidden_B1D: Tensor, tensors: Sequence[Tensor],
                 key: Hashable) -> Tensor:
        """tensors: all tensors that `run` updates. key: changes whenever a captured `run` becomes invalid.

        Raises ValueError where the tensors are on several devices.
        """
        key = (key, hidden_B1D.shape, hidden_B1D.dtype, torch.is_inference_mode_enabled())
        same = key == self._key and len(tensors) == len(self._tensors) and all(
            x is y() for x, y in zip(tensors, self._tensors, strict=True))
        if not same:
            _check_devices(hidden_B1D, tensors)
            self._graph, self._key, self._tensors = None, key, [weakref.ref(x) for x in tensors]
        elif self._graph is not None:
            self._into.copy_(hidden_B1D)
            self._graph.replay()
            return self._out.clone()
        out = run(hidden_B1D)
        if same and not self._failed:
            self._capture(run, hidden_B1D)
        return out

    def _capture(self, run: Callable[[Tensor], Tensor], hidden_B1D: Tensor) -> None:
        """Capture `run`; no kernel runs, and the token's result stays valid if this fails."""
        device, graph = hidden_B1D.device, torch.cuda.CUDAGraph()
        self._into = hidden_B1D.clone()
        try:
            with _capture_lock, torch.cuda.device(device), torch.cuda.graph(
                    graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
                self._out = run(self._into)
        except RuntimeError as error:
            self._failed = True
            _logger.warning("cuda_graph: a decoded token could not be captured, tokens run eagerly (%s)",
                            error)
        else:
            self._graph = graph


def _check_devices(hidden_B1D: Tensor, tensors: Sequence[Tensor]) -> None:
    devices = {x.device for x in (hidden_B1D, *tensors)}
    if len(devices) > 1:
        raise ValueError(f"cuda_graph needs a model on one GPU, not on {', '.join(sorted(map(str, devices)))}; "
                         "leave it off")
