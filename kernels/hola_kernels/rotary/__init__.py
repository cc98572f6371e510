"""Rotary positions of queries and keys, in place: no second copy of either is saved for the backward pass.

A rotation is undone by the rotation back, so nothing of x is saved. Cosines and sines are made once for the documents
of a micro-batch (or for rows of one length) and serve all layers, forward and backward.
For training only, so the package does not name it at its top: what it names travels with exported models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_floating, check_writable
from hola_kernels.errors import KernelError
from hola_kernels.memo import by_shape, memoise
from hola_kernels.norms import compute_dtype
from hola_kernels.operation import first_order, operation
from hola_kernels.packed import PackedDocuments, documents_of
from hola_kernels.rotary.reference import angles, rotary_reference

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # (x, cos, sin, where the result goes)


@operation
def rotary_(*, x: Tensor, base: float, cu_seqlens: Tensor | PackedDocuments | None = None, before: int = 0,
            dx_buffer: Callable[[], Tensor] | None = None, backend: str = "auto") -> Tensor:
    """x [B, S, H, K] rotated by its tokens' positions, which start at 0 in every row or packed document.

    x is overwritten (not by the reference): go on with what is returned. K is even.
    base: of the angles' frequencies, above 0.
    cu_seqlens [N + 1]: documents packed into one row (B = 1).
    before: tokens of the first document (without cu_seqlens: of every row) that lie elsewhere, before x.
    dx_buffer: called in the backward pass, gives memory like x where x's gradient may be left.
    Raises KernelError.
    """
    check_floating(x=x)
    if x.ndim != 4 or x.shape[-1] % 2 or not x.shape[-1]:
        raise KernelError(f"x {tuple(x.shape)} must be [B, S, H, K] with an even K")
    if not isinstance(base, float | int) or isinstance(base, bool) or not base > 0:
        raise KernelError(f"base = {base!r} must be a number above 0")
    if not isinstance(before, int) or isinstance(before, bool) or before < 0:
        raise KernelError(f"before = {before!r} must be a whole number of at least 0")
    check_writable(x=x)
    documents = documents_of(x, cu_seqlens, read=False)
    cos, sin = _tables(documents, x, base, before)
    refusal = "rotary positions do not take float64" if x.dtype == torch.float64 else None
    name = choose_backend(backend, x.device, refusal)
    if name == "reference" or not x.numel():
        return rotary_reference(x, cos, sin)
    return _Rotary.apply(x, cos, sin, _rotate_torch if name == "torch" else _rotate_triton, dx_buffer)


class _Rotary(torch.autograd.Function):
    """x becomes what it is rotated to. The tables are held, not saved: they are the same for all layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotate: Rotate,
                dx_buffer: Callable[[], Tensor] | None) -> Tensor:
        ctx.cos, ctx.sin, ctx.rotate, ctx.dx_buffer = cos, sin, rotate, dx_buffer
        rotate(x, cos, sin, x)
        return x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        room = None if ctx.dx_buffer is None else ctx.dx_buffer()
        if room is None or room.shape != dy.shape or room.dtype != dy.dtype:
            room = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        ctx.rotate(dy, ctx.cos, -ctx.sin, room)
        return room, None, None, None, None


def _rotate_torch(x: Tensor, cos: Tensor, sin: Tensor, into: Tensor) -> None:
    # through .data, as a kernel writes: autograd would forbid it of a view beside which there are others
    into.data.copy_(rotary_reference(x, cos, sin))


def _rotate_triton(x: Tensor, cos: Tensor, sin: Tensor, into: Tensor) -> None:
    from hola_kernels.rotary.triton_heads import rotate_triton  # on first use: triton may be missing

    rotate_triton(x, cos, sin, into)


def _tables(documents: PackedDocuments | None, x: Tensor, base: float, before: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, K / 2] of x's tokens."""
    length, how = x.shape[1], (x.shape[1], x.shape[3], float(base), before, compute_dtype(x))
    if documents is None:
        return _of_rows(*how, x.device)
    bounds = documents.on(x.device)

    def make() -> tuple[Tensor, Tensor]:
        starts = bounds[:-1].clone()
        starts[0] -= before
        position = torch.arange(length, device=x.device)
        position -= torch.repeat_interleave(starts, bounds.diff(), output_size=length)
        return angles(position, x.shape[3], base, compute_dtype(x))

    return memoise(bounds, ("rotary", *how), make)


@by_shape
def _of_rows(length: int, width: int, base: float, before: int, dtype: torch.dtype,
             device: torch.device) -> tuple[Tensor, Tensor]:
    return angles(torch.arange(length, device=device) + before, width, base, dtype)


__all__ = ["rotary_"]
