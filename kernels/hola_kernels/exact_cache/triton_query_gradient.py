"""Exact read, backward: dq from the logit gradients D of `triton_pair_gradient`.

    g_i = K^-1/2 gamma sum_j D_ij k_j         dq_i = g_i - q_i (mean r_i^2 g_i . q_i)
The gammas need one sum only, X = K^-1/2 sum_i (sum_j D_ij k_j) q_i, taken here: d gamma_q = gamma_k X
and d gamma_k = gamma_q X.

Work for (16, 2048, 4, 256, 64), K = 256, bf16: 15 GFLOP; HBM reads D, k, q, writes dq (260 MB): 0.06 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.exact_cache.read_configs import Tile
from hola_kernels.unit_table import UnitTable


@triton.jit
def _through_norm(g, x_ptr, at, is_row, norm, mean):
    """g - x (mean norm^2 g . x): the gradient of x from the gradient g of gamma-scaled normalised rows, x from memory.

    x is read twice rather than kept: beside g it would not fit the registers.
    """
    x = tl.load(x_ptr + at, mask=is_row[:, None], other=0.0).to(tl.float32)
    along = tl.sum(g * x, 1) * norm * norm * mean
    tl.debug_barrier()  # or the compiler would merge the two loads
    x = tl.load(x_ptr + at, mask=is_row[:, None], other=0.0).to(tl.float32)
    return g - x * along[:, None]


@triton.jit
def _query_gradient_kernel(dlogit_ptr, q_ptr, k_ptr, query_norm_ptr, gamma_q_ptr, gamma_k_ptr, slots_ptr, units_ptr,
                           dq_ptr, part_ptr, q_stride, k_stride, H, w, scratch_rows, scratch_columns, mean, scale,
                           K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLOT_TILES: tl.constexpr,
                           ROW_TILES: tl.constexpr, INCOMING: tl.constexpr, ADD: tl.constexpr,
                           PRECISION: tl.constexpr):
    """dq [M, H, K] and part [programs, K] of X; one program owns [ROWS] queries of a block and head.

    Registers: dq [ROWS, K] float32. Shared memory: D [ROWS, COLUMNS] and k [COLUMNS, K] per stage.
    ADD: dq holds another gradient of q, to which this one is added.
    """
    tile = ROW_TILES - 1 - tl.program_id(0) % ROW_TILES  # the longest walks first
    h = (tl.program_id(0) // ROW_TILES) % H
    unit = tl.program_id(0) // (ROW_TILES * H)
    start = tl.load(units_ptr + unit * 5)
    count = tl.load(units_ptr + unit * 5 + 1)
    ordinal = tl.load(units_ptr + unit * 5 + 2)
    d_K, c_C = tl.arange(0, K), tl.arange(0, COLUMNS)
    part = part_ptr + tl.program_id(0).to(tl.int64) * K + d_K
    if tile * ROWS >= count:
        tl.store(part, tl.zeros((K,), tl.float32))
    else:
        place_R = tile * ROWS + tl.arange(0, ROWS)
        is_row = place_R < count
        row_R = (start + place_R).to(tl.int64)
        dq = tl.zeros((ROWS, K), tl.float32)
        slots_at = slots_ptr + (unit.to(tl.int64) * H + h) * w
        slot_row = tl.load(slots_at + c_C, mask=c_C < w, other=-1)
        scratch = dlogit_ptr + (unit.to(tl.int64) * H + h) * scratch_rows * scratch_columns
        scratch_at = place_R[:, None] * scratch_columns + c_C[None, :]
        first = 0 if INCOMING else tl.where(ordinal > 0, 0, SLOT_TILES)
        last = SLOT_TILES + tl.cdiv(tl.minimum(count, (tile + 1) * ROWS), COLUMNS)
        for t in tl.range(first, last):
            cached = t < SLOT_TILES
            place_C = (t - SLOT_TILES) * COLUMNS + c_C
            if SLOT_TILES > 1:
                slot_row = tl.load(slots_at + t * COLUMNS + c_C, mask=cached & (t * COLUMNS + c_C < w), other=-1)
            seen = tl.where(cached, slot_row >= 0, place_C < count)
            row_C = tl.where(cached, slot_row, start + place_C).to(tl.int64)
            dlogit = tl.load(scratch + t * COLUMNS + scratch_at)
            k = tl.load(k_ptr + (row_C * k_stride + h * K)[:, None] + d_K[None, :], mask=seen[:, None], other=0.0)
            dq = tl.dot(dlogit, k, dq, input_precision=PRECISION)

        dq = dq * scale
        at = (row_R * q_stride + h * K)[:, None] + d_K[None, :]
        q = tl.load(q_ptr + at, mask=is_row[:, None], other=0.0).to(tl.float32)
        tl.store(part, tl.sum(dq * q, 0))
        norm = tl.load(query_norm_ptr + row_R * H + h, mask=is_row, other=0.0)
        gamma = tl.load(gamma_q_ptr + d_K).to(tl.float32) * tl.load(gamma_k_ptr + d_K).to(tl.float32)
        dq = _through_norm(dq * gamma[None, :], q_ptr, at, is_row, norm, mean)
        out = dq_ptr + (row_R * H + h)[:, None] * K + d_K[None, :]
        if ADD:
            dq += tl.load(out, mask=is_row[:, None], other=0.0).to(tl.float32)
        tl.store(out, dq.to(dq_ptr.dtype.element_ty), mask=is_row[:, None])


def launch_query_gradient(*, dlogit: Tensor, q_MHK: Tensor, k_RHK: Tensor, query_norm_MH: Tensor, gamma_q: Tensor,
                          gamma_k: Tensor, slots_UHw: Tensor, units: UnitTable, mean: float, incoming: bool,
                          dq_MHK: Tensor, add: bool, tile: Tile) -> Tensor:
    """Fills (or adds to) dq; returns partial sums [P, K] of X. tile.columns: the width that D was written in."""
    heads, key_dim = q_MHK.shape[1:]
    slots = slots_UHw.shape[2]
    row_tiles = triton.cdiv(units.size, tile.rows)
    programs = units.units * heads * row_tiles
    part = torch.empty(programs, key_dim, dtype=torch.float32, device=q_MHK.device)
    _query_gradient_kernel[(programs,)](
        dlogit, q_MHK, k_RHK, query_norm_MH, gamma_q, gamma_k, slots_UHw, units.table, dq_MHK, part, q_MHK.stride(0),
        k_RHK.stride(0), heads, slots, *dlogit.shape[2:], mean, key_dim**-0.5, K=key_dim, ROWS=tile.rows,
        COLUMNS=tile.columns, SLOT_TILES=triton.cdiv(slots, tile.columns), ROW_TILES=row_tiles, INCOMING=incoming,
        ADD=add, PRECISION="tf32x3", **tile.launch)
    return part
