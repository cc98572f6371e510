"""All forward and backward passes of a training step as one CUDA graph.

The host needs 5 to 7 ms to launch one layer, forward and backward; where a rank has few tokens, its GPU waits for that.
A graph is launched once a step. What it holds is fixed: addresses, shapes, and every number that was read on the host
while it was made. So a step's micro-batches are laid into tensors that stay where they are, documents are cut
into tables as long as their room allows (`Documents.bounded`), and nothing on the way reads the device.

    graph = StepGraph(passes)      # passes(batches) -> results: as without a graph
    results = graph(batches)       # the first steps as without, on those same tensors; then captured, and replayed

More documents than there is room for: more room, and another capture. That runs nothing, so ranks need not agree on it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hola_megatron.data.stream import Batch
from hola_megatron.parallel.groups import release_at_stop

WARM_STEPS = 2  # compile kernels, make what is made once (workspaces, tables of rows, communicators)
ROOM_STEP = 16  # documents

Results = list[dict[str, Tensor]]
Passes = Callable[[list[Batch]], Results]


class StepGraph:
    """`passes` over a step's micro-batches, replayed; its results stay valid until the next call."""

    def __init__(self, passes: Passes, device: torch.device):
        self._passes, self._device = passes, device
        self._fixed: list[Batch] = []
        self._graph: Any = None
        self._results: Results = []
        self._warm = 0
        release_at_stop(self)

    def release(self) -> None:
        """Drop the graph and its memory. NCCL does not close a communicator that a graph still holds: it waits."""
        if self._graph is not None:
            torch.cuda.synchronize()
            self._results = []
            self._graph.reset()
            self._graph = None

    def __call__(self, batches: list[Batch]) -> Results:
        if not self._fits(batches):
            self._make_room(batches)
        for fixed, batch in zip(self._fixed, batches, strict=True):
            fill(fixed, batch)
        if self._warm < WARM_STEPS:
            self._warm += 1
            return self._passes(self._fixed)
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._results

    def _fits(self, batches: list[Batch]) -> bool:
        if [b.tokens.shape for b in batches] != [b.tokens.shape for b in self._fixed]:
            return False
        return batches[0].cu_seqlens is None or most_documents(batches) < self._fixed[0].cu_seqlens.numel()

    def _make_room(self, batches: list[Batch]) -> None:
        self.release()
        documents = None if batches[0].cu_seqlens is None else room_for(most_documents(batches))
        self._fixed = [fixed_like(batch, documents, self._device) for batch in batches]

    def _capture(self) -> None:
        """Passes are recorded, not run. Allocations are the graph's own from here on, so eager memory is given back."""
        gc.collect()
        torch.cuda.empty_cache()
        self._graph = torch.cuda.CUDAGraph()
        # other threads (NCCL's watchdog, a checkpoint's writer) may ask the device something meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = self._passes(self._fixed)


def most_documents(batches: list[Batch]) -> int:
    return max(batch.cu_seqlens.numel() - 1 for batch in batches)


def room_for(documents: int) -> int:
    """Half as many again: the count differs from step to step, and an empty document costs next to nothing."""
    return -(-documents * 3 // (2 * ROOM_STEP)) * ROOM_STEP


def fixed_like(batch: Batch, documents: int | None, device: torch.device) -> Batch:
    """A micro-batch's tensors on the device, with room for so many documents (None: rows without cuts)."""
    cuts = None if documents is None else torch.zeros(documents + 1, dtype=torch.int64, device=device)
    return Batch(*(torch.empty_like(x, device=device) for x in (batch.tokens, batch.labels, batch.loss_mask)), cuts)


def fill(fixed: Batch, batch: Batch) -> None:
    """The micro-batch's numbers; behind its documents empty ones at the last token's end."""
    pairs = [(fixed.tokens, batch.tokens), (fixed.labels, batch.labels), (fixed.loss_mask, batch.loss_mask)]
    if fixed.cu_seqlens is not None:
        missing = fixed.cu_seqlens.numel() - batch.cu_seqlens.numel()
        end = batch.cu_seqlens[-1:]
        pairs.append((fixed.cu_seqlens, torch.cat([batch.cu_seqlens, end.expand(missing)]).long()))
    for to, x in pairs:
        to.copy_(x.pin_memory() if to.is_cuda and not x.is_cuda else x, non_blocking=True)
