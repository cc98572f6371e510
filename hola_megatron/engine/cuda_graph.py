"""The forward and backward pass of a micro-batch as one CUDA graph, replayed for all micro-batches of all steps.

The host needs 5 to 7 ms to launch the kernels of one layer, forward and backward; with few tokens per micro-batch the
GPU waits for the host. A graph is launched at once. Fixed at capture are addresses, shapes, and every value read on the
host. So a micro-batch is copied into static tensors, tables of its documents have the size of the recipe's maximum
(`FixedBatch.documents`), and the captured code never reads the device. Zeroing and reducing gradients, clipping and the
optimizer's update are outside of the graph.

    graph = MicroBatchGraph(passes, device, max_documents)   # passes(batch) -> [loss, tokens]; accumulates gradients
    sums = graph(batch)                                      # the first call runs eagerly and then captures

A micro-batch that does not fit (more documents than the maximum, another shape) runs eagerly. The graph is released
before, since its memory would stay allocated, and captured again after the next one that fits. The maximum comes from
the recipe, not from the data: a resumed run computes the same sums in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hola_kernels import PackedDocuments, recording
from hola_megatron.data.stream import Batch
from hola_megatron.parallel.groups import release_at_stop

TOKENS_A_DOCUMENT = 256  # default maximum: one document per so many tokens
DOCUMENTS_STEP = 16  # table sizes are multiples of 16, so no kernel is specialised and compiled during capture

Passes = Callable[[Any], Tensor]  # of a Batch or FixedBatch


@dataclass(frozen=True)
class FixedBatch:
    """A micro-batch in static tensors: `Batch` with cu_seqlens [max_documents + 1] int64 on the device.

    The trailing documents are empty.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor | None

    @property
    def documents(self) -> PackedDocuments | None:
        """A new value in every pass, since a graph must compute the tables from the static tensor in every replay.

        With max_seqlen the numbers are not read on the host.
        """
        return None if self.cu_seqlens is None else PackedDocuments(self.cu_seqlens, self.tokens.shape[1])


class MicroBatchGraph:
    """`passes` over one micro-batch, captured once and replayed.

    max_documents: of a micro-batch; None where rows are not packed.
    log: called with one line at the first capture, and at the first micro-batch with too many documents.

    All work runs on `stream`. DistributedDataParallel must be built on it as well: autograd accumulates a parameter's
    gradients on the stream of its first use, and another stream than the captured one costs memory (the default stream
    fails the capture). Without a GPU nothing is captured.
    """

    def __init__(self, passes: Passes, device: torch.device, max_documents: int | None,
                 log: Callable[[str], None] = print):
        self._passes, self._device, self.max_documents, self._log = passes, device, max_documents, log
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._captures = self.stream is not None
        self._fixed: FixedBatch | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tables: Any = None  # of the captured passes, which read their memory at every replay
        self._sums: Tensor | None = None
        self._logged: set[str] = set()
        release_at_stop(self)

    def __call__(self, batch: Batch) -> Tensor:
        """The result of `passes`, as a new tensor."""
        with self.on_its_stream():
            if not self._fits(batch):
                self.release()
                return self._passes(batch)
            fill(self._fixed, batch)
            if self._graph is not None:
                self._graph.replay()
                return self._sums.clone()
            sums = self._passes(self._fixed)  # warm-up: compiles kernels and fills caches, directly before the capture
            if self._captures:
                self._capture()
            return sums

    def release(self) -> None:
        """Release the graph and its memory. NCCL waits forever when it closes a communicator that a graph uses."""
        graph, self._graph, self._sums, self._tables = self._graph, None, None, None
        if graph is not None:
            torch.cuda.synchronize()
            graph.reset()

    def leave(self) -> None:
        """Run the same passes eagerly from now on, on the same tensors, tables and stream."""
        self.release()
        self._captures = False

    @contextmanager
    def on_its_stream(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        now = torch.cuda.current_stream()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            yield
        now.wait_stream(self.stream)

    def _fits(self, batch: Batch) -> bool:
        if self._fixed is None:
            self._fixed = fixed_like(batch, self.max_documents, self._device)
        documents = 0 if batch.documents is None else batch.documents.count
        if documents > (self.max_documents or 0):
            self._log_once("documents", f"graph | a micro-batch has {documents} documents, the CUDA graph at most "
                           f"{self.max_documents}: such ones run without it; train.cuda_graph_documents sets the "
                           "maximum")
            return False
        return batch.tokens.shape == self._fixed.tokens.shape

    def _capture(self) -> None:
        """Capture the passes; no kernel runs. Other threads (NCCL's watchdog, a checkpoint writer) may use the device.
        """
        start, graph = time.perf_counter(), torch.cuda.CUDAGraph()
        try:
            with recording() as tables, torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                sums = self._passes(self._fixed)
        except RuntimeError as error:
            raise _first_out_of_memory(error) from None
        self._graph, self._tables, self._sums = graph, tables, sums
        self._log_once("captured", f"graph | a micro-batch was captured in {time.perf_counter() - start:.1f} s")

    def _log_once(self, what: str, text: str) -> None:
        if what not in self._logged:
            self._logged.add(what)
            self._log(text)


def _first_out_of_memory(error: BaseException) -> BaseException:
    """The OutOfMemoryError in the context of `error`, if any: the end of a failed capture raises an error of its own.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.cuda.OutOfMemoryError):
            return seen
        seen = seen.__context__
    return error


def default_max_documents(rows: int, length: int) -> int:
    """Default maximum of documents in a micro-batch of `rows` samples of `length` tokens: twice the usual number."""
    return -(-rows * max(4, length // TOKENS_A_DOCUMENT) // DOCUMENTS_STEP) * DOCUMENTS_STEP


def fixed_like(batch: Batch, max_documents: int | None, device: torch.device) -> FixedBatch:
    """Static tensors on the device for micro-batches of this shape."""
    cu_seqlens = None
    if batch.documents is not None:
        cu_seqlens = torch.zeros(max_documents + 1, dtype=torch.int64, device=device)
    tokens, labels, mask = (torch.empty_like(x, device=device) for x in (batch.tokens, batch.labels, batch.loss_mask))
    return FixedBatch(tokens, labels, mask, cu_seqlens)


def fill(fixed: FixedBatch, batch: Batch) -> None:
    """Copy the micro-batch into the static tensors; its documents are followed by empty ones."""
    pairs = [(fixed.tokens, batch.tokens), (fixed.labels, batch.labels), (fixed.loss_mask, batch.loss_mask)]
    if fixed.cu_seqlens is not None:
        missing = fixed.cu_seqlens.numel() - batch.cu_seqlens.numel()
        end = batch.cu_seqlens[-1:]
        pairs.append((fixed.cu_seqlens, torch.cat([batch.cu_seqlens, end.expand(missing)])))
    for to, x in pairs:
        to.copy_(x.pin_memory() if to.is_cuda and not x.is_cuda else x, non_blocking=True)
