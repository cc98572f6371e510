"""Collectives of context parallelism on torch.distributed (NCCL and gloo), synchronous and asynchronous, with counters.

    gather                               asynchronous all-gather, not differentiable
    start_reduce_scatter, start_shift    asynchronous reduce-scatter; asynchronous send to a neighbour
    Gather                               all-gather; backward is a reduce-scatter
    SendRight, ReceiveLeft               send to the right neighbour; backward sends the gradient to the left

All ranks must call these in the same order, forward and backward. So every rank calls each of them and keeps it in its
autograd graph, also where it sends nothing or does not use the result.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hola_kernels.stages import first_order
from hola_megatron.parallel.waiting import waiting_for_ranks


@dataclass(frozen=True)
class Sent:
    """One collective on one rank. payload: bytes that it contributes; received: bytes that it gets from other ranks."""

    kind: str
    what: str
    payload: int
    received: int


_open_logs: list[list[Sent]] = []


@contextmanager
def counted() -> Iterator[list[Sent]]:
    """Record every collective of this module that this process issues inside the context."""
    log: list[Sent] = []
    _open_logs.append(log)
    try:
        yield log
    finally:
        _open_logs.remove(log)


def _count(kind: str, what: str, payload: int, received: int) -> None:
    for log in _open_logs:
        log.append(Sent(kind, what, payload, received))


class Pending:
    """Handle of an asynchronous collective. `wait` returns its result: the current stream waits, the host does not."""

    def __init__(self, received: Tensor, works: list[dist.Work], sent: Tensor):
        self._received, self._works, self._sent = received, works, sent  # the input must live until it was sent

    @waiting_for_ranks()
    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        self._works, self._sent = [], None
        return self._received


def gather(x: Tensor, group: dist.ProcessGroup, what: str) -> Pending:
    """Start the all-gather of x, which has the same shape on every rank: [ranks, *shape]; not differentiable."""
    x = x.detach().contiguous()
    size = group.size()
    gathered = x.new_empty(size, *x.shape)
    _count("all-gather", what, x.nbytes, x.nbytes * (size - 1))
    return Pending(gathered, [_all_gather()(gathered.view(-1), x.view(-1), group=group, async_op=True)], x)


class Gather(torch.autograd.Function):
    """All-gather x [...] -> [ranks, ...]; backward sums the ranks' gradients in float32 (float64 for float64 input)."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
        ctx.group, ctx.what, ctx.dtype = group, what, x.dtype
        return gather(x, group, what).wait()

    @staticmethod
    @first_order
    def backward(ctx, dall: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(dall, ctx.group, ctx.what).to(ctx.dtype), None, None


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """x [ranks, ...] -> this rank's shard [...], summed over the ranks in float32 (float64 for float64 input)."""
    return start_reduce_scatter(x, group, what).wait()


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup, what: str) -> Pending:
    """`reduce_scatter`, asynchronous."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    shard = torch.empty_like(x[0])
    _count("reduce-scatter", what, x.nbytes, shard.nbytes * (group.size() - 1))
    work = _reduce_scatter()(shard.view(-1), x.view(-1), group=group, async_op=True)
    return Pending(shard, [work], x)


@dataclass
class NeighbourExchange:
    """The message in flight of a `SendRight` and `ReceiveLeft` pair, in the forward and then in the backward pass."""

    group: dist.ProcessGroup
    what: str
    pending: Pending | None = None


class SendRight(torch.autograd.Function):
    """Identity of x [N, T, D] that starts to send the first columns of the last tokens to the right neighbour.

    Returns x and an empty tensor, the input of `ReceiveLeft`. What is computed between the two, forward and backward,
    overlaps with the message. Backward adds the received gradient in place: a separate gradient would cost one more
    pass over all of x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, tokens: int, columns: int, exchange: NeighbourExchange) -> tuple[Tensor, Tensor]:
        ctx.last, ctx.exchange = (slice(None), slice(x.shape[1] - tokens, None), slice(columns)), exchange
        exchange.pending = start_shift(x[ctx.last], 1, exchange.group, exchange.what)
        return x.view_as(x), x.new_empty(0)

    @staticmethod
    @first_order
    def backward(ctx, dx: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        dx[ctx.last] += ctx.exchange.pending.wait()
        return dx, None, None, None


class ReceiveLeft(torch.autograd.Function):
    """The tensor from the left neighbour (zeros on the first rank); backward starts to send its gradient back."""

    @staticmethod
    def forward(ctx, sent: Tensor, exchange: NeighbourExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.pending.wait()

    @staticmethod
    @first_order
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.pending = start_shift(dy, -1, exchange.group, exchange.what)
        return dy.new_empty(0), None


def shift(x: Tensor, step: int, group: dist.ProcessGroup, what: str) -> Tensor:
    """Send x `step` ranks to the right; returns the tensor received from `step` ranks to the left, zeros if none."""
    return start_shift(x, step, group, what).wait()


def start_shift(x: Tensor, step: int, group: dist.ProcessGroup, what: str) -> Pending:
    """`shift`, asynchronous."""
    rank, size = group.rank(), group.size()
    x, received = x.detach().contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
    sends, receives = 0 <= rank + step < size, 0 <= rank - step < size
    # as bytes: gloo has no point-to-point bfloat16
    operations = [(dist.isend, as_bytes(x), rank + step)] * sends
    operations += [(dist.irecv, as_bytes(received), rank - step)] * receives
    _count("shift", what, x.nbytes * sends, received.nbytes * receives)
    works = dist.batch_isend_irecv([dist.P2POp(op, buffer, group=group, group_peer=peer)
                                    for op, buffer, peer in operations])
    return Pending(received, works, x)


def as_bytes(x: Tensor) -> Tensor:
    """A contiguous tensor as a uint8 vector, a view."""
    return x.view(-1).view(torch.uint8)


@functools.cache
def _all_gather():
    # torch 2.13 renamed both, and warns at the old names
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@functools.cache
def _reduce_scatter():
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
