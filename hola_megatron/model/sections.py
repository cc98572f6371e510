"""The fused input projection cut into its sections, whose gradients meet in one tensor without being copied.

Autograd joins the gradients of a split by writing all of them once more (the whole width of the projection, read and
written). Here an operation that makes a section's gradient may ask for the section's room and write there; what comes
back from elsewhere is copied in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Room = Callable[[], Tensor]


class _Whole:
    """The gradient of the projection, made when its first section is asked for."""

    def __init__(self, like: Tensor, widths: list[int]):
        # without memory: the projection itself is kept only where an operation saves a part of it
        self.like, self.device = torch.empty_like(like, device="meta"), like.device
        self.widths, self.gradient = widths, None

    def sections(self) -> tuple[Tensor, ...]:
        if self.gradient is None:
            self.gradient = torch.empty_like(self.like, device=self.device)
        return self.gradient.split(self.widths, -1)

    def take(self) -> Tensor:
        """The gradient, which is the caller's from now on: a second backward pass starts from new memory."""
        gradient, self.gradient = self.gradient, None
        return gradient


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, whole: _Whole) -> tuple[Tensor, ...]:
        ctx.whole = whole
        ctx.set_materialize_grads(False)
        return x.split(whole.widths, -1)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor, None]:
        for room, gradient in zip(ctx.whole.sections(), gradients, strict=True):
            if gradient is None:
                room.zero_()
            elif not _same_memory(room, gradient):
                room.copy_(gradient)
        return ctx.whole.take(), None


def split_sections(x_BSF: Tensor, widths: list[int]) -> tuple[tuple[Tensor, ...], tuple[Room, ...]]:
    """Sections [B, S, width] of x and, for each, where an operation may write its gradient (asked in backward only)."""
    whole = _Whole(x_BSF, widths)

    def room(section: int) -> Room:
        return lambda: whole.sections()[section]

    return _Split.apply(x_BSF, whole), tuple(room(section) for section in range(len(widths)))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same numbers; the stride of an axis of one place says nothing."""
    return (a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape
            and all(m == n for m, n, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1))
