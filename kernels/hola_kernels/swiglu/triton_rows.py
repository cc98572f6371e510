"""SwiGLU in one pass over memory each way; nothing is saved but the input.

A program owns a tile [ROWS, WIDTH] of y: it reads the same columns of gate and of up, and in the backward pass writes
their gradients. Neighbouring programs own neighbouring columns. Numbers stay in registers, 16 a thread: two 16-byte
accesses of each array in 16 bits, enough in flight to fill the memory's time without a loop.
For 65,536 rows of F = 2816 in bf16: forward 1.11 GB, 0.26 ms at 4.3 TB/s; backward 1.85 GB, 0.43 ms.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.integers import cdiv
from hola_kernels.operation import first_order
from hola_kernels.triton_rows import contiguous_columns

NUMBERS, WARPS = 2048, 4  # of y in a tile; 128 threads
WIDTHS = (1024, 512, 256)  # of a tile: a warp reads 512 bytes in a row


@triton.jit
def _tile_indices(F: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(rows [ROWS, 1] in 64 bits, columns [1, WIDTH]) of this program's tile; columns go first."""
    blocks: tl.constexpr = (F + WIDTH - 1) // WIDTH
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    return row[:, None], column[None, :]


@triton.jit
def _forward_kernel(x_ptr, y_ptr, total, x_stride, F: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """y [M, F]; gate and up [ROWS, WIDTH] in registers. F is compiled in: it says how the halves are aligned."""
    row, column = _tile_indices(F, ROWS, WIDTH)
    mask = (row < total) & (column < F)
    at = x_ptr + row * x_stride + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * F + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(x_ptr, dy_ptr, dx_ptr, total, x_stride, dy_stride, F: tl.constexpr, ROWS: tl.constexpr,
                     WIDTH: tl.constexpr):
    """dx [M, 2F]: with s = sigmoid(gate), dgate = dy up s (1 + gate (1 - s)), dup = dy gate s."""
    row, column = _tile_indices(F, ROWS, WIDTH)
    mask = (row < total) & (column < F)
    at = x_ptr + row * x_stride + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = dy * up * share * (1.0 + gate * (1.0 - share))
    dup = dy * (gate * share)
    out = dx_ptr + row * (2 * F) + column
    tl.store(out, dgate.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(out + F, dup.to(dx_ptr.dtype.element_ty), mask=mask)


class SwiGLU(torch.autograd.Function):
    """Rows x [M, 2F] -> y [M, F]; saves x only."""

    @staticmethod
    def forward(ctx: Any, x_M2F: Tensor) -> Tensor:
        total, width = x_M2F.shape[0], x_M2F.shape[1] // 2
        y_MF = torch.empty(total, width, dtype=x_M2F.dtype, device=x_M2F.device)
        grid, tile = _launch(total, width)
        _forward_kernel[grid](x_M2F, y_MF, total, x_M2F.stride(0), **tile)
        ctx.save_for_backward(x_M2F)
        return y_MF

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_MF: Tensor) -> Tensor:
        x_M2F, = ctx.saved_tensors
        dy_MF = contiguous_columns(dy_MF)
        dx_M2F = torch.empty(x_M2F.shape, dtype=x_M2F.dtype, device=x_M2F.device)
        grid, tile = _launch(*dy_MF.shape)
        _backward_kernel[grid](x_M2F, dy_MF, dx_M2F, dy_MF.shape[0], x_M2F.stride(0), dy_MF.stride(0), **tile)
        return dx_M2F


def swiglu_triton(x_M2F: Tensor) -> Tensor:
    """Same contract as `reference.swiglu_reference`."""
    return SwiGLU.apply(contiguous_columns(x_M2F))


def _launch(total: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile: of the width that leaves the fewest columns of the last tile empty."""
    columns = min(WIDTHS, key=lambda each: -width % each)
    rows = NUMBERS // columns
    programs = cdiv(total, rows) * cdiv(width, columns)
    return (programs,), {"F": width, "ROWS": rows, "WIDTH": columns, "num_warps": WARPS}
