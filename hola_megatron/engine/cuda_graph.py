"""The forward and backward pass of a micro-batch as one CUDA graph, replayed for all micro-batches of all steps.

The host needs 5 to 7 ms to launch one layer, forward and backward; where a micro-batch has few tokens, the GPU waits
for that. A graph is launched at once. What it holds is fixed: addresses, shapes, and every number that was read on the
host while it was recorded. So a micro-batch is laid into tensors that stay where they are, its documents are cut into
tables as long as their room allows (`Documents.bounded`), and nothing on the way reads the device. Zeroing and reducing
gradients, clipping and the optimizer stay outside, and have no part in it.

    graph = MicroBatchGraph(passes, device, room)     # passes(batch) -> [loss, tokens], gradients added up
    sums = graph(batch)                               # the first one runs as without a graph, and is recorded then

A micro-batch that does not fit (more documents than there is room for, another shape) runs as without a graph, which is
dropped before, since its memory would be held beside, and recorded again after the next that fits. The room is the
recipe's, not the data's: a resumed run makes the same sums in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.memo import Recording, recording
from hola_megatron.data.stream import Batch
from hola_megatron.parallel.groups import release_at_stop

TOKENS_A_DOCUMENT = 256  # room for a document for so many tokens, unless the recipe says how many
ROOM_STEP = 16  # documents; counts of units stay multiples of 16, so no kernel is compiled while a graph is recorded

Passes = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class FixedBatch(Batch):
    """A micro-batch in tensors that stay. cu_seqlens [room + 1] int64 on their device, the last documents empty."""


class MicroBatchGraph:
    """`passes` over one micro-batch, replayed.

    room: documents that a micro-batch may have, None where rows are not cut. say: told once when recorded, once when
    something has no room. `stream` is where all of it runs, and where data parallelism must be told of the
    parameters: autograd adds a parameter's gradients up on the stream on which it first met it, and any other stream
    than the recorded one costs memory (or, the default one, the graph). Without a GPU nothing is recorded.
    """

    def __init__(self, passes: Passes, device: torch.device, room: int | None, say: Callable[[str], None] = print):
        self._passes, self._device, self.room, self._say = passes, device, room, say
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._records = self.stream is not None
        self._fixed: FixedBatch | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tables: Recording | None = None
        self._sums: Tensor | None = None
        self._said: set[str] = set()
        release_at_stop(self)

    def __call__(self, batch: Batch) -> Tensor:
        """What `passes` returns, a tensor of the caller's own."""
        with self.on_its_stream():
            if not self._fits(batch):
                self.release()
                return self._passes(batch)
            fill(self._fixed, batch)
            if self._graph is not None:
                self._graph.replay()
                return self._sums.clone()
            sums = self._passes(self._fixed)  # compiles, and makes what is made once; nothing comes between the two
            if self._records:
                self._record()
            return sums

    def release(self) -> None:
        """Drop the graph and its memory. NCCL does not close a communicator that a graph still holds: it waits."""
        graph, self._graph, self._sums, self._tables = self._graph, None, None, None
        if graph is not None:
            torch.cuda.synchronize()
            graph.reset()

    def leave(self) -> None:
        """The same passes on the same tensors, tables and stream, and no graph of them from here on."""
        self.release()
        self._records = False

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
            self._fixed = fixed_like(batch, self.room, self._device)
        documents = 0 if batch.cu_seqlens is None else batch.cu_seqlens.numel() - 1
        if documents > (self.room or 0):
            self._say_once("room", f"graph | a micro-batch of {documents} documents has no room in the CUDA graph of "
                           f"{self.room}: such ones run without it; train.cuda_graph_documents sets the room")
            return False
        return batch.tokens.shape == self._fixed.tokens.shape

    def _record(self) -> None:
        """Nothing runs meanwhile. Other threads (NCCL's watchdog, a checkpoint's writer) may talk to the device."""
        began, graph = time.perf_counter(), torch.cuda.CUDAGraph()
        try:
            with recording() as tables, torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                sums = self._passes(self._fixed)
        except RuntimeError as error:
            raise _first_out_of_memory(error) from None
        self._graph, self._tables, self._sums = graph, tables, sums
        self._say_once("recorded", f"graph | a micro-batch was recorded in {time.perf_counter() - began:.1f} s")

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._say(text)


def _first_out_of_memory(error: BaseException) -> BaseException:
    """The end of a recording that failed raises an error of its own, which hides what a user can act upon."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.cuda.OutOfMemoryError):
            return seen
        seen = seen.__context__
    return error


def room_for(rows: int, length: int) -> int:
    """Documents a micro-batch of `rows` samples of `length` tokens has room for: twice what is usual."""
    return -(-rows * max(4, length // TOKENS_A_DOCUMENT) // ROOM_STEP) * ROOM_STEP


def fixed_like(batch: Batch, room: int | None, device: torch.device) -> FixedBatch:
    """Tensors on the device for micro-batches of this shape."""
    cuts = None if batch.cu_seqlens is None else torch.zeros(room + 1, dtype=torch.int64, device=device)
    tokens, labels, mask = (torch.empty_like(x, device=device) for x in (batch.tokens, batch.labels, batch.loss_mask))
    return FixedBatch(tokens, labels, mask, cuts)


def fill(fixed: FixedBatch, batch: Batch) -> None:
    """The micro-batch's numbers; behind its documents empty ones at the last token's end."""
    pairs = [(fixed.tokens, batch.tokens), (fixed.labels, batch.labels), (fixed.loss_mask, batch.loss_mask)]
    if fixed.cu_seqlens is not None:
        missing = fixed.cu_seqlens.numel() - batch.cu_seqlens.numel()
        end = batch.cu_seqlens[-1:]
        pairs.append((fixed.cu_seqlens, torch.cat([batch.cu_seqlens, end.expand(missing)]).long()))
    for to, x in pairs:
        to.copy_(x.pin_memory() if to.is_cuda and not x.is_cuda else x, non_blocking=True)
