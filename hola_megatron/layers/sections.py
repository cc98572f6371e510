"""Split of the fused input projection into sections, whose gradients are written into one tensor.

Autograd concatenates the gradients of a split: one more read and write of the whole projection. Here an operation that
computes a section's gradient may write it directly into that section of the projection's gradient (`GradientBuffer`);
gradients allocated elsewhere are copied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hola_kernels.stages import first_order

GradientBuffer = Callable[[], Tensor]  # called in backward; returns the section of the gradient to write to


class _ProjectionGradient:
    """The gradient of the projection, allocated when its first section is requested."""

    def __init__(self, like: Tensor, widths: list[int]):
        # on meta, without memory: the projection stays alive only where an operation saves a section of it
        self.like, self.device = torch.empty_like(like, device="meta"), like.device
        self.widths, self.gradient = widths, None

    def sections(self) -> tuple[Tensor, ...]:
        if self.gradient is None:
            self.gradient = torch.empty_like(self.like, device=self.device)
        return self.gradient.split(self.widths, -1)

    def take(self) -> Tensor:
        """The gradient; ownership moves to the caller, and a second backward pass allocates a new one."""
        gradient, self.gradient = self.gradient, None
        return gradient


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, whole: _ProjectionGradient) -> tuple[Tensor, ...]:
        ctx.whole = whole
        ctx.set_materialize_grads(False)
        return x.split(whole.widths, -1)

    @staticmethod
    @first_order
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor, None]:
        for section, gradient in zip(ctx.whole.sections(), gradients, strict=True):
            if gradient is None:
                section.zero_()
            elif not _same_memory(section, gradient):
                section.copy_(gradient)
        return ctx.whole.take(), None


def split_sections(x_BSF: Tensor, widths: list[int]) -> tuple[tuple[Tensor, ...], tuple[GradientBuffer, ...]]:
    """Sections [B, S, width] of x, and the gradient buffer of each (to be called in backward only)."""
    whole = _ProjectionGradient(x_BSF, widths)

    def buffer(section: int) -> GradientBuffer:
        return lambda: whole.sections()[section]

    return _Split.apply(x_BSF, whole), tuple(buffer(section) for section in range(len(widths)))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a and b are the same view of memory; strides of axes of size 1 do not matter."""
    return (a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape
            and all(m == n for m, n, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1))
