"""The gated RMS norm in one pass over memory each way.

A program owns a tile of rows and, in the backward pass, walks over several tiles to sum the
weight gradient in registers; the programs' sums are then added up: deterministic. Nothing is
saved but the inputs: the norm of a row is cheaper to compute again than to read.
For 131,072 rows of 256 in bf16: forward 0.20 GB, 0.047 ms at 4.3 TB/s; backward 0.34 GB, 0.078 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1056  # of the backward pass: eight for each of an H200's 132 multiprocessors


@triton.jit
def _forward_kernel(x_ptr, gate_ptr, weight_ptr, y_ptr, total, x_stride, gate_stride, V, eps, ROWS: tl.constexpr,
                    WIDTH: tl.constexpr):
    """y [M, V]; x and gate [ROWS, WIDTH] in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mask = (row < total)[:, None] & (d < V)[None, :]
    wide = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide * x_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + wide * gate_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < V, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(x * x, 1) / V + eps)
    y = x * norm[:, None] * weight[None, :] * (gate * tl.sigmoid(gate))
    tl.store(y_ptr + wide * V + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(x_ptr, gate_ptr, weight_ptr, dy_ptr, dx_ptr, dgate_ptr, part_ptr, total, x_stride, gate_stride,
                     dy_stride, V, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """dx, dgate [M, V], part [programs, V]: with u = x * norm, n = u * weight and s = sigmoid(gate),

    du = dy weight gate s      dx = norm (du - u mean(u du))      dgate = dy n s (1 + gate (1 - s))
    """
    d = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + d, mask=d < V, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)  # summed over rows once, at the end
    for first in tl.range(tl.program_id(0) * ROWS, total, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < total)[:, None] & (d < V)[None, :]
        wide = row.to(tl.int64)[:, None]
        x = tl.load(x_ptr + wide * x_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + wide * gate_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide * dy_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        norm = tl.rsqrt(tl.sum(x * x, 1) / V + eps)
        u = x * norm[:, None]
        share = tl.sigmoid(gate)
        passed = dy * (gate * share)
        dweight += passed * u
        du = passed * weight[None, :]
        dx = (du - u * (tl.sum(u * du, 1) / V)[:, None]) * norm[:, None]
        dgate = dy * u * weight[None, :] * share * (1.0 + gate * (1.0 - share))
        out = wide * V + d[None, :]
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + tl.program_id(0) * V + d, tl.sum(dweight, 0), mask=d < V)


class GatedRmsNorm(torch.autograd.Function):
    """Rows x, gate [M, V]; saves its inputs only."""

    @staticmethod
    def forward(ctx, x_MV, gate_MV, weight_V, eps: float):
        total, width = x_MV.shape
        y_MV = torch.empty(total, width, dtype=x_MV.dtype, device=x_MV.device)
        tile = _tile(width, 4096)
        _forward_kernel[(triton.cdiv(total, tile["ROWS"]),)](
            x_MV, gate_MV, weight_V, y_MV, total, x_MV.stride(0), gate_MV.stride(0), width, eps, **tile, num_warps=4)
        ctx.save_for_backward(x_MV, gate_MV, weight_V)
        ctx.eps = eps
        return y_MV

    @staticmethod
    def backward(ctx, dy_MV):
        x_MV, gate_MV, weight_V = ctx.saved_tensors
        total, width = x_MV.shape
        dy_MV = _rows(dy_MV)
        dx_MV, dgate_MV = (torch.empty(total, width, dtype=x.dtype, device=x.device) for x in (x_MV, gate_MV))
        tile = _tile(width, 2048)
        programs = min(triton.cdiv(total, tile["ROWS"]), PROGRAMS)
        parts = torch.empty(programs, width, dtype=torch.float32, device=x_MV.device)
        _backward_kernel[(programs,)](
            x_MV, gate_MV, weight_V, dy_MV, dx_MV, dgate_MV, parts, total, x_MV.stride(0), gate_MV.stride(0),
            dy_MV.stride(0), width, ctx.eps, **tile, num_warps=4)
        return dx_MV, dgate_MV, parts.sum(0).to(weight_V.dtype), None


def gated_rms_norm_triton(x_MV: Tensor, gate_MV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
    """Same contract as `reference.gated_rms_norm_reference`."""
    if not x_MV.numel():
        return x_MV * gate_MV
    return GatedRmsNorm.apply(_rows(x_MV), _rows(gate_MV), weight_V.contiguous(), eps)


def _tile(width: int, numbers: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"ROWS": max(1, numbers // padded), "WIDTH": padded}


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
