"""The collectives of context parallelism, thin over torch.distributed: NCCL and gloo, sync and async, counted.

    gather        all-gather of one tensor, started now, waited for later; no gradient of its own
    Gather        all-gather whose gradient returns by reduce-scatter
    ShiftRight    every rank's tensor to its right neighbour; the gradient returns to the left

Ranks must meet in the same order forward and backward. So every rank calls every one of them, also
where it has nothing to send or does not look at what it gets, and keeps it in its autograd graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sent:
    """One collective as one rank saw it. payload: bytes it contributes; received: bytes that reach it from others."""

    kind: str
    what: str
    payload: int
    received: int


_open_logs: list[list[Sent]] = []


@contextmanager
def counted() -> Iterator[list[Sent]]:
    """While open, every collective of this module that this process issues is appended to the list."""
    log: list[Sent] = []
    _open_logs.append(log)
    try:
        yield log
    finally:
        _open_logs.remove(log)


def _count(kind: str, what: str, payload: int, received: int) -> None:
    for log in _open_logs:
        log.append(Sent(kind, what, payload, received))


class Gathering:
    """An all-gather under way. `wait` returns [ranks, *shape] once, in the order of ranks."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup, what: str):
        self._sent = x.contiguous()  # kept until it has left
        size = group.size()
        self._all = x.new_empty(size, *x.shape)
        _count("all-gather", what, self._sent.nbytes, self._sent.nbytes * (size - 1))
        self._work = _all_gather()(self._all.view(-1), self._sent.view(-1), group=group, async_op=True)

    def wait(self) -> Tensor:
        self._work.wait()
        return self._all


def gather(x: Tensor, group: dist.ProcessGroup, what: str) -> Gathering:
    """Start the all-gather of x, the same shape on every rank; no gradient."""
    return Gathering(x.detach(), group, what)


class Gather(torch.autograd.Function):
    """x [...] -> [ranks, ...]; the gradients of all ranks for this rank's x are summed in float32 (float64)."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
        ctx.group, ctx.what, ctx.dtype = group, what, x.dtype
        return gather(x, group, what).wait()

    @staticmethod
    def backward(ctx, dall: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(dall, ctx.group, ctx.what).to(ctx.dtype), None, None


def reduce_scatter(all_parts: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """[ranks, ...] -> this rank's part, summed over the ranks in float32 (float64)."""
    all_parts = all_parts.to(torch.promote_types(all_parts.dtype, torch.float32)).contiguous()
    part = torch.empty_like(all_parts[0])
    _count("reduce-scatter", what, all_parts.nbytes, part.nbytes * (group.size() - 1))
    _reduce_scatter()(part.view(-1), all_parts.view(-1), group=group)
    return part


class ShiftRight(torch.autograd.Function):
    """x -> what the left neighbour gave (zeros on the first rank); the gradient goes the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
        ctx.group, ctx.what = group, what
        return shift(x, 1, group, what)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return shift(dy, -1, ctx.group, ctx.what), None, None


def shift(x: Tensor, step: int, group: dist.ProcessGroup, what: str) -> Tensor:
    """Send x `step` ranks to the right and return what came from there; zeros where nobody sends."""
    rank, size = group.rank(), group.size()
    x, received = x.detach().contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
    sends, receives = 0 <= rank + step < size, 0 <= rank - step < size
    # bytes: gloo knows no point-to-point bfloat16
    operations = [(dist.isend, as_bytes(x), rank + step)] * sends
    operations += [(dist.irecv, as_bytes(received), rank - step)] * receives
    _count("shift", what, x.nbytes * sends, received.nbytes * receives)
    works = dist.batch_isend_irecv([dist.P2POp(op, buffer, group=group, group_peer=peer)
                                    for op, buffer, peer in operations])
    for work in works:
        work.wait()
    return received


def as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor as one row of bytes."""
    return x.view(-1).view(torch.uint8)


@functools.cache
def _all_gather():
    # torch 2.13 renamed both, and warns at the old names
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@functools.cache
def _reduce_scatter():
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
