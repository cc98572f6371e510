"""Exact read, backward, first pass: dq, and the weights and logit gradients that the second pass needs.

With P the softmax weights, s = sigmoid(gate) (1 when not combined) and dy the incoming gradient,
    D_i = s dy_i . o_i        dS_ij = P_ij (s dy_i . v_j - D_i)        du_i = K^-1/2 gamma sum_j dS_ij u_j
where u are normalised rows and gamma = gamma_q gamma_k; dq_i is du_i through the norm. The keys'
side needs the same P and dS from the other end, so they are written once in 16 bit (each half of
116 MB at the shape below) instead of being computed twice: 5 matrix products in all, not 7, and no
accumulated product is ever transposed. d gamma needs one sum only, X = sum_ij dS_ij u_i u_j:
d gamma_q = gamma_k X and d gamma_k = gamma_q X.

Work for (16, 2048, 4, 256, 64), K = V = 256, bf16: 6 * 224 * 256 FLOP a query and head = 45 GFLOP;
HBM reads q, k, v, o, dy (335 MB), writes dq, P, dS (183 MB): floor 0.12 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.exact_cache.read_configs import read_config
from hola_kernels.exact_cache.triton_forward import LOG2E, _row_dots
from hola_kernels.unit_table import UnitTable


@triton.jit
def _query_gradient_kernel(q_ptr, k_ptr, v_ptr, key_norm_ptr, gamma_q_ptr, gamma_k_ptr, sink_ptr, gate_ptr, dy_ptr,
                           o_ptr, lse_ptr, query_norm_ptr, slots_ptr, units_ptr, dq_ptr, weight_ptr, dlogit_ptr, gamma_part_ptr,
                           head_part_ptr, staged_ptr, q_stride, k_stride, v_stride, dy_stride, H, w, scratch_rows, scratch_columns,
                           mean, scale, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                           SLOT_TILES: tl.constexpr, ROW_TILES: tl.constexpr, SINK: tl.constexpr,
                           COMBINE: tl.constexpr, INCOMING: tl.constexpr, STAGED: tl.constexpr, ADD: tl.constexpr,
                           PRECISION: tl.constexpr):
    """One program owns [ROWS] queries of a block and head and walks over the key tiles they see.

    Shared memory: q' [ROWS, K] and dy [ROWS, V] once, k and v tiles [COLUMNS, K or V] per stage.
    Registers: dq [ROWS, K] float32, logits and their gradients [ROWS, COLUMNS] float32.
    Partial sums for gamma [programs, K] and (sink, gate) [U * ROW_TILES, H, 2] go to HBM, summed later in
    a fixed order. ADD: dq holds another gradient of q, to which this one is added.
    """
    tile = ROW_TILES - 1 - tl.program_id(0) % ROW_TILES  # the longest walks first
    h = (tl.program_id(0) // ROW_TILES) % H
    unit = tl.program_id(0) // (ROW_TILES * H)
    start = tl.load(units_ptr + unit * 5)
    count = tl.load(units_ptr + unit * 5 + 1)
    ordinal = tl.load(units_ptr + unit * 5 + 2)
    d_K, d_V, c_C = tl.arange(0, K), tl.arange(0, V), tl.arange(0, COLUMNS)
    head_part = head_part_ptr + ((unit * ROW_TILES + tile) * H + h) * 2
    gamma_part = gamma_part_ptr + tl.program_id(0).to(tl.int64) * K
    if tile * ROWS >= count:
        tl.store(gamma_part + d_K, tl.zeros((K,), tl.float32))
        tl.store(head_part + tl.arange(0, 2), tl.zeros((2,), tl.float32))
    else:
        place_R = tile * ROWS + tl.arange(0, ROWS)
        is_row = place_R < count
        row_R = (start + place_R).to(tl.int64)
        dtype = k_ptr.dtype.element_ty

        share = tl.sigmoid(tl.load(gate_ptr + h).to(tl.float32)) if COMBINE else 1.0
        at_H = row_R * H + h
        dy_at = row_R * dy_stride + h * V
        delta = _row_dots(dy_ptr, o_ptr, dy_at, at_H * V, is_row, V, ROWS, V if V < 64 else 64) * share
        lse = tl.load(lse_ptr + at_H, mask=is_row, other=float("inf"))
        if SINK:
            sink_weight = tl.exp2(tl.load(sink_ptr + h).to(tl.float32) * LOG2E - lse)
            tl.store(head_part, -tl.sum(sink_weight * delta))
        tl.store(head_part + 1, tl.sum(delta))

        gamma = tl.load(gamma_q_ptr + d_K).to(tl.float32) * tl.load(gamma_k_ptr + d_K).to(tl.float32)
        q_at = q_ptr + row_R[:, None] * q_stride + h * K + d_K[None, :]
        q = tl.load(q_at, mask=is_row[:, None], other=0.0).to(tl.float32)
        q_norm = tl.load(query_norm_ptr + at_H, mask=is_row, other=0.0)
        q = (q * (q_norm * (scale * LOG2E))[:, None] * gamma[None, :]).to(dtype)
        if STAGED:  # a tile that was computed stays in registers as an operand, one that was loaded does not
            staged_at = staged_ptr + (row_R * H + h)[:, None] * K + d_K[None, :]
            tl.store(staged_at, q, mask=is_row[:, None])
            tl.debug_barrier()
            q = tl.load(staged_at, mask=is_row[:, None], other=0.0)

        dy = tl.load(dy_ptr + dy_at[:, None] + d_V[None, :], mask=is_row[:, None], other=0.0)

        dq = tl.zeros((ROWS, K), tl.float32)
        along = tl.zeros((ROWS,), tl.float32)  # du . u, which the norm takes out of du: also sum_j dS_ij logit_ij
        slots_at = slots_ptr + (unit.to(tl.int64) * H + h) * w
        slot_row = tl.load(slots_at + c_C, mask=c_C < w, other=-1)
        scratch = (unit.to(tl.int64) * H + h) * scratch_rows * scratch_columns
        scratch_at = place_R[:, None] * scratch_columns + c_C[None, :]  # 32 bit: 64-bit pointers would spill
        first = 0 if INCOMING else tl.where(ordinal > 0, 0, SLOT_TILES)
        last = SLOT_TILES + tl.cdiv(tl.minimum(count, (tile + 1) * ROWS), COLUMNS)
        for t in tl.range(first, last):
            cached = t < SLOT_TILES
            place_C = (t - SLOT_TILES) * COLUMNS + c_C
            if SLOT_TILES > 1:
                slot_row = tl.load(slots_at + t * COLUMNS + c_C, mask=cached & (t * COLUMNS + c_C < w), other=-1)
            seen = tl.where(cached, slot_row >= 0, place_C < count)
            row_C = tl.where(cached, slot_row, start + place_C).to(tl.int64)
            k = tl.load(k_ptr + row_C[:, None] * k_stride + h * K + d_K[None, :], mask=seen[:, None], other=0.0)
            v = tl.load(v_ptr + row_C[:, None] * v_stride + h * V + d_V[None, :], mask=seen[:, None], other=0.0)
            key_norm = tl.load(key_norm_ptr + row_C * H + h, mask=seen, other=0.0)
            logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * key_norm[None, :]
            visible = seen[None, :] & (cached | (place_C[None, :] <= place_R[:, None]))
            weight = tl.where(visible, tl.exp2(logit - lse[:, None]), 0.0)
            dweight = tl.dot(dy, tl.trans(v), input_precision=PRECISION) * share
            dlogit = weight * (dweight - delta[:, None])
            along += tl.sum(dlogit * tl.where(visible, logit, 0.0), 1)
            out = scratch + t * COLUMNS
            tl.store(weight_ptr + out + scratch_at, weight.to(dtype))
            tl.store(dlogit_ptr + out + scratch_at, (dlogit * q_norm[:, None]).to(dtype))
            dq = tl.dot((dlogit * key_norm[None, :]).to(dtype), k, dq, input_precision=PRECISION)

        along = along * (mean / LOG2E)
        unit_q = tl.load(q_at, mask=is_row[:, None], other=0.0).to(tl.float32) * q_norm[:, None]
        tl.store(gamma_part + d_K, tl.sum(dq * unit_q, 0) * scale)
        dq = (dq * (gamma * scale)[None, :] - unit_q * along[:, None]) * q_norm[:, None]
        dq_at = dq_ptr + at_H[:, None] * K + d_K[None, :]
        if ADD:
            dq += tl.load(dq_at, mask=is_row[:, None], other=0.0).to(tl.float32)
        tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=is_row[:, None])


def launch_query_gradient(*, q_MHK: Tensor, k_RHK: Tensor, v_RHV: Tensor, key_norm_RH: Tensor, gamma_q: Tensor,
                          gamma_k: Tensor, sink_H: Tensor | None, gate_H: Tensor | None, dy_MHV: Tensor,
                          o_cache_MHV: Tensor, lse_MH: Tensor, query_norm_MH: Tensor, slots_UHw: Tensor, units: UnitTable, mean: float,
                          incoming: bool, dq_MHK: Tensor, add: bool, config=None) -> tuple[Tensor, ...]:
    """Fills dq; returns (weights, logit gradients) [U, H, rows, places], and the partial sums
    (gamma [P, K], sink and gate [P', H, 2]), and the tile width that `places` is laid out in.

    Places: ceil(w / columns) tiles of slots, then the block's tokens. The logit gradients are already
    multiplied by the inverse norm of their query.
    """
    heads, key_dim = q_MHK.shape[1:]
    value_dim, slots = v_RHV.shape[2], slots_UHw.shape[2]
    tile = (config or read_config(key_dim, value_dim, k_RHK.dtype, k_RHK.device)).query_gradient
    row_tiles, slot_tiles = triton.cdiv(units.size, tile.rows), triton.cdiv(slots, tile.columns)
    rows = row_tiles * tile.rows
    columns = (slot_tiles + triton.cdiv(units.size, tile.columns)) * tile.columns
    device, programs = q_MHK.device, units.units * heads * row_tiles
    weight, dlogit = (torch.empty(units.units, heads, rows, columns, dtype=k_RHK.dtype, device=device)
                      for _ in range(2))
    gamma_part = torch.empty(programs, key_dim, dtype=torch.float32, device=device)
    head_part = torch.empty(units.units * row_tiles, heads, 2, dtype=torch.float32, device=device)
    unused = lse_MH
    staged_MHK = torch.empty(q_MHK.shape, dtype=k_RHK.dtype, device=q_MHK.device) if tile.staged else unused
    _query_gradient_kernel[(programs,)](
        q_MHK, k_RHK, v_RHV, key_norm_RH, gamma_q, gamma_k, unused if sink_H is None else sink_H,
        unused if gate_H is None else gate_H, dy_MHV, o_cache_MHV, lse_MH, query_norm_MH, slots_UHw, units.table, dq_MHK, weight,
        dlogit, gamma_part, head_part, staged_MHK, q_MHK.stride(0), k_RHK.stride(0), v_RHV.stride(0), dy_MHV.stride(0), heads,
        slots, rows, columns, mean, key_dim**-0.5, K=key_dim, V=value_dim, ROWS=tile.rows, COLUMNS=tile.columns,
        SLOT_TILES=slot_tiles, ROW_TILES=row_tiles, SINK=sink_H is not None, COMBINE=gate_H is not None,
        INCOMING=incoming, STAGED=tile.staged, ADD=add, PRECISION="tf32x3", num_warps=tile.warps, num_stages=tile.stages)
    return weight, dlogit, gamma_part, head_part, tile.columns
