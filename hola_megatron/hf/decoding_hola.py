"""One decoded token through all layers as a CUDA graph.

A token needs a few dozen launches a layer, each far shorter on the GPU than on the host. H and G layers
keep a constant number of bytes at fixed addresses and update them in place, so one recording serves every
token after it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_one_at_a_time = threading.Lock()
_logger = logging.getLogger(__name__)


class DecodingGraph:
    """Calls `run`, which maps hidden [B, 1, D] to the same shape and updates memories in place; replays it later.

    The first token after something has changed (a prompt, beams put in another order, another batch) runs as it is,
    the second too, and is recorded then; from the third on the recording is replayed. So nothing is recorded where
    memories are replaced at every token. Where recording fails, that is said, and tokens run as without.
    """

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._held: list[weakref.ref[Tensor]] = []  # what goes with the recording, kept alive by the cache alone
        self._key: Hashable = None
        self._failed = False
        self._into = self._out = torch.empty(0)

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodingGraph, ()  # a copied cache has its own memories, and its own graph

    def __call__(self, run: Callable[[Tensor], Tensor], hidden_B1D: Tensor, held: Sequence[Tensor],
                 key: Hashable) -> Tensor:
        """held: all tensors that `run` updates; key: equal as long as a recording of `run` still is what `run` does.

        Raises ValueError where the memories lie on several devices.
        """
        key = (key, hidden_B1D.shape, hidden_B1D.dtype, torch.is_inference_mode_enabled())
        same = key == self._key and len(held) == len(self._held) and all(
            x is y() for x, y in zip(held, self._held, strict=True))
        if not same:
            _check_devices(hidden_B1D, held)
            self._graph, self._key, self._held = None, key, [weakref.ref(x) for x in held]
        elif self._graph is not None:
            self._into.copy_(hidden_B1D)
            self._graph.replay()
            return self._out.clone()
        out = run(hidden_B1D)
        if same and not self._failed:
            self._record(run, hidden_B1D)
        return out

    def _record(self, run: Callable[[Tensor], Tensor], hidden_B1D: Tensor) -> None:
        """Nothing runs meanwhile: the token's work has been done, and must not be lost if this fails."""
        device, graph = hidden_B1D.device, torch.cuda.CUDAGraph()
        self._into = hidden_B1D.clone()
        try:
            with _one_at_a_time, torch.cuda.device(device), torch.cuda.graph(
                    graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
                self._out = run(self._into)
        except RuntimeError as error:
            self._failed = True
            _logger.warning("cuda_graph: a decoded token could not be recorded, tokens run one launch at a time (%s)",
                            error)
        else:
            self._graph = graph


def _check_devices(hidden_B1D: Tensor, held: Sequence[Tensor]) -> None:
    devices = {x.device for x in (hidden_B1D, *held)}
    if len(devices) > 1:
        raise ValueError(f"cuda_graph needs a model on one GPU, not on {', '.join(sorted(map(str, devices)))}; "
                         "leave it off")
