"""The gated RMS norm in one pass over memory each way.

A program owns a tile of rows and, in the backward pass, loops over several tiles to sum the
weight gradient in registers; the programs' sums are then added up: deterministic. Nothing is
saved but the inputs: the norm of a row is cheaper to compute again than to read.
For 131,072 rows of 256 in bf16: forward 0.20 GB, 0.047 ms at 4.3 TB/s; backward 0.34 GB, 0.078 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.integers import cdiv
from hola_kernels.operation import first_order
from hola_kernels.triton_rows import GradBuffer, contiguous_columns, gradient_rows, row_tile
from hola_kernels.triton_sums import sum_parts

PROGRAMS = 1056  # of the backward pass: eight for each of an H200's 132 multiprocessors


@triton.jit
def _row_offset(row, H, token_stride, head_stride):
    """In 64 bits: tensors whose heads lie outermost have head strides of a whole sequence."""
    return (row // H).to(tl.int64) * token_stride + (row % H).to(tl.int64) * head_stride


@triton.jit
def _load(ptr, row, H, token_stride, head_stride, d, mask):
    """Rows of [M, H, V], each row number a token and a head."""
    at = _row_offset(row, H, token_stride, head_stride)
    return tl.load(ptr + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(x_ptr, gate_ptr, weight_ptr, y_ptr, total, H, x_token, x_head, gate_token, gate_head, V, eps,
                    ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """y [M, H, V]; x and gate [ROWS, WIDTH] in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mask = (row < total)[:, None] & (d < V)[None, :]
    x = _load(x_ptr, row, H, x_token, x_head, d, mask)
    gate = _load(gate_ptr, row, H, gate_token, gate_head, d, mask)
    weight = tl.load(weight_ptr + d, mask=d < V, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(x * x, 1) / V + eps)
    y = x * norm[:, None] * weight[None, :] * (gate * tl.sigmoid(gate))
    tl.store(y_ptr + row.to(tl.int64)[:, None] * V + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(x_ptr, gate_ptr, weight_ptr, dy_ptr, dx_ptr, dgate_ptr, part_ptr, total, H, x_token, x_head,
                     gate_token, gate_head, dy_token, dy_head, dgate_token, dgate_head, V, eps, ROWS: tl.constexpr,
                     WIDTH: tl.constexpr):
    """dx, dgate [M, H, V], part [programs, V]: with u = x * norm, n = u * weight and s = sigmoid(gate),

    du = dy weight gate s      dx = norm (du - u mean(u du))      dgate = dy n s (1 + gate (1 - s))
    """
    d = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + d, mask=d < V, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)  # summed over rows once, at the end
    for first in tl.range(tl.program_id(0) * ROWS, total, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < total)[:, None] & (d < V)[None, :]
        x = _load(x_ptr, row, H, x_token, x_head, d, mask)
        gate = _load(gate_ptr, row, H, gate_token, gate_head, d, mask)
        dy = _load(dy_ptr, row, H, dy_token, dy_head, d, mask)
        norm = tl.rsqrt(tl.sum(x * x, 1) / V + eps)
        u = x * norm[:, None]
        share = tl.sigmoid(gate)
        passed = dy * (gate * share)
        dweight += passed * u
        du = passed * weight[None, :]
        dx = (du - u * (tl.sum(u * du, 1) / V)[:, None]) * norm[:, None]
        dgate = dy * u * weight[None, :] * share * (1.0 + gate * (1.0 - share))
        tl.store(dx_ptr + row.to(tl.int64)[:, None] * V + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        at = _row_offset(row, H, dgate_token, dgate_head)
        tl.store(dgate_ptr + at[:, None] + d[None, :], dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + tl.program_id(0) * V + d, tl.sum(dweight, 0), mask=d < V)


class GatedRmsNorm(torch.autograd.Function):
    """x, gate [M, H, V], rows of V contiguous; saves its inputs only."""

    @staticmethod
    def forward(ctx, x_MHV: Tensor, gate_MHV: Tensor, weight_V: Tensor, eps: float,
                dgate_buffer: GradBuffer | None) -> Tensor:
        tokens, heads, width = x_MHV.shape
        y_MHV = torch.empty(x_MHV.shape, dtype=x_MHV.dtype, device=x_MHV.device)
        tile = row_tile(width, 4096)
        _forward_kernel[(cdiv(tokens * heads, tile["ROWS"]),)](
            x_MHV, gate_MHV, weight_V, y_MHV, tokens * heads, heads, *x_MHV.stride()[:2], *gate_MHV.stride()[:2], width,
            eps, **tile, num_warps=4)
        ctx.save_for_backward(x_MHV, gate_MHV, weight_V)
        ctx.eps, ctx.dgate_buffer = eps, dgate_buffer
        return y_MHV

    @staticmethod
    @first_order
    def backward(ctx, dy_MHV: Tensor) -> tuple[Tensor | None, ...]:
        x_MHV, gate_MHV, weight_V = ctx.saved_tensors
        tokens, heads, width = x_MHV.shape
        dy_MHV = contiguous_columns(dy_MHV)
        dx_MHV = torch.empty(x_MHV.shape, dtype=x_MHV.dtype, device=x_MHV.device)
        dgate_MHV = gradient_rows(ctx.dgate_buffer, _by_heads, gate_MHV, gate_MHV.device)
        tile = row_tile(width, 2048)
        programs = min(cdiv(tokens * heads, tile["ROWS"]), PROGRAMS)
        parts = torch.empty(programs, width, dtype=torch.float32, device=x_MHV.device)
        _backward_kernel[(programs,)](
            x_MHV, gate_MHV, weight_V, dy_MHV, dx_MHV, dgate_MHV, parts, tokens * heads, heads, *x_MHV.stride()[:2],
            *gate_MHV.stride()[:2], *dy_MHV.stride()[:2], *dgate_MHV.stride()[:2], width, ctx.eps, **tile, num_warps=4)
        return dx_MHV, dgate_MHV, sum_parts(parts, weight_V.dtype), None, None


def gated_rms_norm_triton(x: Tensor, gate: Tensor, weight_V: Tensor, eps: float,
                          dgate_buffer: GradBuffer | None = None) -> Tensor:
    """Same contract as `gated_rms_norm_reference`, of any leading axes."""
    if not x.numel():
        return x * gate
    return GatedRmsNorm.apply(_by_heads(x), _by_heads(gate), weight_V.contiguous(), eps,
                              dgate_buffer).view(x.shape)


def _by_heads(x: Tensor) -> Tensor:
    """[..., H, V] -> [M, H, V], a copy only if the leading axes or the columns are not evenly spaced."""
    return contiguous_columns(x.flatten(0, -3) if x.ndim > 2 else x.reshape(-1, 1, x.shape[-1]))
