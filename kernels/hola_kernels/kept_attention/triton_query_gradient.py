"""Attention to kept tokens, backward: what a query's own token and sink have, then dq.

With P the weights, delta_i = do_i . o_i and dS_ij = P_ij (do_i . v_j - delta_i),
    dq_i = scale (sum_j dS_ij k_j + dS_ii k_i)     dsink = -sum_i P_i,sink delta_i
and of a token's read of itself dk_i = scale dS_ii q_i, dv_i = P_ii do_i. The first kernel, row by row, leaves delta,
dS_ii, these dk and dv of all tokens and sums for the sink. For kept tokens `triton_key_gradient` adds the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.block_table import BlockTable
from hola_kernels.exact_cache.read_configs import Tile
from hola_kernels.exact_cache.triton_forward import LOG2E, sink_logit
from hola_kernels.integers import cdiv
from hola_kernels.kept_attention.lists import KeptLists
from hola_kernels.triton_block_table import COUNT, SEGMENT, START, block_entry


@dataclass(frozen=True)
class OwnGradient:
    """delta, dlogit [M, H] float32: do . o and dS_ii; dk [M, H, K], dv [M, H, V]; sink_part [tiles, H] float32."""

    delta: Tensor
    dlogit: Tensor
    dk: Tensor
    dv: Tensor
    sink_part: Tensor


@triton.jit
def _own_gradient_kernel(q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, lse_ptr, sink_ptr, delta_ptr, dlogit_ptr, dk_ptr, dv_ptr,
                         part_ptr, q_stride, k_stride, v_stride, do_stride, tokens, H, scale, K: tl.constexpr,
                         V: tl.constexpr, ROWS: tl.constexpr, SINK: tl.constexpr):
    """[ROWS] tokens of a head; all in registers, [ROWS, K] and [ROWS, V] float32."""
    h = tl.program_id(0) % H
    tile = tl.program_id(0) // H
    row_R = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = row_R < tokens
    d_K, d_V = tl.arange(0, K), tl.arange(0, V)
    at_H = row_R * H + h
    q = tl.load(q_ptr + (row_R * q_stride + h * K)[:, None] + d_K[None, :], mask=is_row[:, None],
                other=0.0).to(tl.float32)
    k = tl.load(k_ptr + (row_R * k_stride + h * K)[:, None] + d_K[None, :], mask=is_row[:, None],
                other=0.0).to(tl.float32)
    v = tl.load(v_ptr + (row_R * v_stride + h * V)[:, None] + d_V[None, :], mask=is_row[:, None],
                other=0.0).to(tl.float32)
    do = tl.load(do_ptr + (row_R * do_stride + h * V)[:, None] + d_V[None, :], mask=is_row[:, None],
                 other=0.0).to(tl.float32)
    o = tl.load(o_ptr + at_H[:, None] * V + d_V[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + at_H, mask=is_row, other=float("inf"))
    delta = tl.sum(do * o, 1)
    weight = tl.exp2(tl.sum(q * k, 1) * (scale * LOG2E) - lse)
    dlogit = weight * (tl.sum(do * v, 1) - delta)
    tl.store(delta_ptr + at_H, delta, mask=is_row)
    tl.store(dlogit_ptr + at_H, dlogit, mask=is_row)
    tl.store(dk_ptr + at_H[:, None] * K + d_K[None, :], ((dlogit * scale)[:, None] * q).to(dk_ptr.dtype.element_ty),
             mask=is_row[:, None])
    tl.store(dv_ptr + at_H[:, None] * V + d_V[None, :], (weight[:, None] * do).to(dv_ptr.dtype.element_ty),
             mask=is_row[:, None])
    if SINK:
        tl.store(part_ptr + tile * H + h, -tl.sum(tl.exp2(sink_logit(sink_ptr, h) - lse) * delta))


@triton.jit
def _kept_query_gradient_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dlogit_ptr, weight_ptr, rows_ptr,
                                before_ptr, first_ptr, entries_ptr, dq_ptr, q_stride, k_stride, v_stride, do_stride,
                                list_stride, tokens, documents, blocks, H, scale, one,
                                K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                                WEIGHTED: tl.constexpr, PRECISION: tl.constexpr):
    """dq [M, H, K] of [ROWS] queries of a block and head.

    Shared memory: q [ROWS, K] and do [ROWS, V] once, k and v tiles [COLUMNS, K or V] per stage.
    Registers: dq [ROWS, K] float32, two [ROWS, COLUMNS] float32.
    """
    h = tl.program_id(0) % H
    block = blocks - 1 - tl.program_id(0) // H  # the longest loops first
    start = block_entry(entries_ptr, block, START)
    count = block_entry(entries_ptr, block, COUNT)
    document = block_entry(entries_ptr, block, SEGMENT)
    if count > 0:
        r_R, c_C, d_K, d_V = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, K), tl.arange(0, V)
        is_row = r_R < count
        row_R = (start + r_R).to(tl.int64)
        at_H = row_R * H + h
        dtype = k_ptr.dtype.element_ty
        list_at = h.to(tl.int64) * list_stride
        before_at = before_ptr + h.to(tl.int64) * tokens + start
        base2 = scale * LOG2E

        q = tl.load(q_ptr + (row_R * q_stride + h * K)[:, None] + d_K[None, :], mask=is_row[:, None], other=0.0)
        do = tl.load(do_ptr + (row_R * do_stride + h * V)[:, None] + d_V[None, :], mask=is_row[:, None], other=0.0)
        lse = tl.load(lse_ptr + at_H, mask=is_row, other=float("inf"))
        delta = tl.load(delta_ptr + at_H, mask=is_row, other=0.0)
        before_R = tl.load(before_at + r_R, mask=is_row, other=0)
        begin = tl.load(first_ptr + h * (documents + 1) + document)
        end = tl.load(before_at + count - 1)
        dq = tl.zeros((ROWS, K), tl.float32)
        for first in tl.range(begin, end, COLUMNS):
            index_C = first + c_C
            seen = index_C < end
            row_C = tl.load(rows_ptr + list_at + index_C, mask=seen, other=0).to(tl.int64)
            k = tl.load(k_ptr + (row_C * k_stride + h * K)[:, None] + d_K[None, :], mask=seen[:, None], other=0.0)
            v = tl.load(v_ptr + (row_C * v_stride + h * V)[:, None] + d_V[None, :], mask=seen[:, None], other=0.0)
            logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * base2
            if WEIGHTED:
                logit += (tl.load(weight_ptr + row_C * H + h, mask=seen, other=0.0) * LOG2E)[None, :]
            visible = index_C[None, :] < before_R[:, None]
            weight = tl.where(visible, tl.exp2(logit - lse[:, None]), 0.0)
            dweight = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            dlogit = weight * (dweight - delta[:, None])
            # times one (a number the compiler does not know): no product is left running into the next step, where the
            # registers of its left operand would be written before anything waits for it (triton issue 9433)
            dq = tl.dot(dlogit.to(dtype), k, dq, input_precision=PRECISION) * one

        own = tl.load(dlogit_ptr + at_H, mask=is_row, other=0.0)
        k = tl.load(k_ptr + (row_R * k_stride + h * K)[:, None] + d_K[None, :], mask=is_row[:, None], other=0.0)
        dq = (dq + own[:, None] * k.to(tl.float32)) * scale
        tl.store(dq_ptr + at_H[:, None] * K + d_K[None, :], dq.to(dq_ptr.dtype.element_ty), mask=is_row[:, None])


def launch_own_gradient(*, q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, do_MHV: Tensor, o_MHV: Tensor, lse_MH: Tensor,
                        sink_H: Tensor | None, scale: float) -> OwnGradient:
    """What the tokens' reads of themselves and the sink leave."""
    (tokens, heads, key_dim), value_dim = q_MHK.shape, v_MHV.shape[2]
    rows = max(1, 4096 // max(key_dim, value_dim))
    tiles = cdiv(tokens, rows)
    found = OwnGradient(torch.empty_like(lse_MH), torch.empty_like(lse_MH),
                        torch.empty(k_MHK.shape, dtype=k_MHK.dtype, device=k_MHK.device),
                        torch.empty(v_MHV.shape, dtype=v_MHV.dtype, device=v_MHV.device),
                        torch.empty(tiles, heads, dtype=torch.float32, device=lse_MH.device))
    _own_gradient_kernel[(tiles * heads,)](
        q_MHK, k_MHK, v_MHV, do_MHV, o_MHV, lse_MH, lse_MH if sink_H is None else sink_H, found.delta, found.dlogit,
        found.dk, found.dv, found.sink_part, q_MHK.stride(0), k_MHK.stride(0), v_MHV.stride(0), do_MHV.stride(0),
        tokens, heads, scale, K=key_dim, V=value_dim, ROWS=rows, SINK=sink_H is not None, num_warps=4)
    return found


def launch_kept_query_gradient(*, q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, do_MHV: Tensor, lse_MH: Tensor,
                               own: OwnGradient, log_weight_MH: Tensor | None, lists: KeptLists, table: BlockTable,
                               scale: float, tile: Tile) -> Tensor:
    """dq [M, H, K]; blocks of tile.rows tokens."""
    tokens, heads, key_dim = q_MHK.shape
    dq = torch.empty(q_MHK.shape, dtype=q_MHK.dtype, device=q_MHK.device)
    _kept_query_gradient_kernel[(table.count * heads,)](
        q_MHK, k_MHK, v_MHV, do_MHV, lse_MH, own.delta, own.dlogit, lse_MH if log_weight_MH is None else log_weight_MH,
        lists.rows, lists.before, lists.first, table.entries, dq, q_MHK.stride(0), k_MHK.stride(0), v_MHV.stride(0),
        do_MHV.stride(0), lists.rows.stride(0), tokens, lists.first.shape[1] - 1, table.count, heads, scale, 1.0,
        K=key_dim, V=v_MHV.shape[2], ROWS=tile.rows, COLUMNS=tile.columns, WEIGHTED=log_weight_MH is not None,
        PRECISION="tf32x3", **tile.launch)
    return dq
