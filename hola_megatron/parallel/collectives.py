"""The collectives of context parallelism, thin over torch.distributed: NCCL and gloo, sync and async, counted.

    gather        all-gather of one tensor, started now, waited for later; no gradient of its own
    start_reduce_scatter, start_shift      the same for a reduce-scatter, and a message to a neighbour
    Gather        all-gather whose gradient returns by reduce-scatter
    LeaveRight, ArriveLeft                 every rank's tensor to its right neighbour; the gradient returns to the left

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


class Pending:
    """A message under way. `wait` returns what has come; the current stream waits for it, not the host."""

    def __init__(self, received: Tensor, works: list[dist.Work], sent: Tensor):
        self._received, self._works, self._sent = received, works, sent  # kept until it has left

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        self._works, self._sent = [], None
        return self._received


def gather(x: Tensor, group: dist.ProcessGroup, what: str) -> Pending:
    """Start the all-gather of x, the same shape on every rank: [ranks, *shape], in their order; no gradient."""
    x = x.detach().contiguous()
    size = group.size()
    everyone = x.new_empty(size, *x.shape)
    _count("all-gather", what, x.nbytes, x.nbytes * (size - 1))
    return Pending(everyone, [_all_gather()(everyone.view(-1), x.view(-1), group=group, async_op=True)], x)


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
    return start_reduce_scatter(all_parts, group, what).wait()


def start_reduce_scatter(all_parts: Tensor, group: dist.ProcessGroup, what: str) -> Pending:
    """`reduce_scatter`, started now and waited for later."""
    all_parts = all_parts.to(torch.promote_types(all_parts.dtype, torch.float32)).contiguous()
    part = torch.empty_like(all_parts[0])
    _count("reduce-scatter", what, all_parts.nbytes, part.nbytes * (group.size() - 1))
    work = _reduce_scatter()(part.view(-1), all_parts.view(-1), group=group, async_op=True)
    return Pending(part, [work], all_parts)


@dataclass
class Shifting:
    """One exchange with the neighbours, in its forward pass and then in its backward pass."""

    group: dist.ProcessGroup
    what: str
    pending: Pending | None = None


class LeaveRight(torch.autograd.Function):
    """x [N, T, D] itself, its last tokens' first columns on their way to the right neighbour; and an empty tensor.

    The latter goes to `ArriveLeft`. What is computed between the two, forward and backward, runs while the message
    travels. Backward adds what came back in place: a gradient of its own would be one more pass over all of x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, tokens: int, columns: int, shifting: Shifting) -> tuple[Tensor, Tensor]:
        ctx.last, ctx.shifting = (slice(None), slice(x.shape[1] - tokens, None), slice(columns)), shifting
        shifting.pending = start_shift(x[ctx.last], 1, shifting.group, shifting.what)
        return x.view_as(x), x.new_empty(0)

    @staticmethod
    def backward(ctx, dx: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        dx[ctx.last] += ctx.shifting.pending.wait()
        return dx, None, None, None


class ArriveLeft(torch.autograd.Function):
    """What the left neighbour gave (zeros on the first rank); backward starts to send its gradient back."""

    @staticmethod
    def forward(ctx, sent: Tensor, shifting: Shifting) -> Tensor:
        ctx.shifting = shifting
        return shifting.pending.wait()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        shifting = ctx.shifting
        shifting.pending = start_shift(dy, -1, shifting.group, shifting.what)
        return dy.new_empty(0), None


def shift(x: Tensor, step: int, group: dist.ProcessGroup, what: str) -> Tensor:
    """Send x `step` ranks to the right and return what came from there; zeros where nobody sends."""
    return start_shift(x, step, group, what).wait()


def start_shift(x: Tensor, step: int, group: dist.ProcessGroup, what: str) -> Pending:
    """`shift`, started now and waited for later."""
    rank, size = group.rank(), group.size()
    x, received = x.detach().contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
    sends, receives = 0 <= rank + step < size, 0 <= rank - step < size
    # bytes: gloo knows no point-to-point bfloat16
    operations = [(dist.isend, as_bytes(x), rank + step)] * sends
    operations += [(dist.irecv, as_bytes(received), rank - step)] * receives
    _count("shift", what, x.nbytes * sends, received.nbytes * receives)
    works = dist.batch_isend_irecv([dist.P2POp(op, buffer, group=group, group_peer=peer)
                                    for op, buffer, peer in operations])
    return Pending(received, works, x)


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
