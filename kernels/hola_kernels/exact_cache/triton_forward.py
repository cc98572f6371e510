"""Cache attention, forward: one softmax over cached slots, local block and sink, flash-style.

The keys of a block form tiles of `columns` keys: first ceil(w / columns) tiles
of cached slots (gathered rows), then the block's own tokens. One program owns `rows` queries
of one block and head and loops over the tiles it can see with an online softmax.

The two norms are folded into the dot: with u = x * r (r the inverse norm of a row),
    logit_ij = K^-1/2 (gamma_q gamma_k u_i) . u_j = K^-1/2 r_i r_j (gamma_q gamma_k q_i) . k_j,
so keys go to the tensor cores as they are in memory, and r_i, r_j scale the logits.

Work for (B, T, H, C, w) = (16, 2048, 4, 256, 64), K = V = 256, bf16: 224 of 320 keys a query
after tiling (184 exact), 4 * 224 * 256 FLOP a query and head = 30 GFLOP; HBM 67 MB each for q, k,
v, o (and o_state, y when combined): 0.27 to 0.40 GB, floor 0.06 to 0.09 ms. The inverse norms of
the keys are a pass of their own over k (67 MB, 0.016 ms), cheaper than a norm per visiting program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.block_table import BlockTable
from hola_kernels.exact_cache.read_configs import Tile
from hola_kernels.exact_cache.triton_window import Window, first_window_tile, in_reach
from hola_kernels.integers import cdiv
from hola_kernels.norms import RMS_EPS
from hola_kernels.triton_block_table import COUNT, INDEX, START, block_entry

LOG2E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(RMS_EPS)
NO_WINDOW = Window()


@triton.jit
def _inverse_norm_kernel(x_ptr, norm_ptr, total, H, stride, mean, D: tl.constexpr, ROWS: tl.constexpr,
                         EPS: tl.constexpr):
    """norm [M, H] = 1 / sqrt(mean * |x|^2 + eps) of rows x [M, H, D]; one tile [ROWS, D] in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = (row // H).to(tl.int64) * stride + (row % H) * D
    x = tl.load(x_ptr + at[:, None] + tl.arange(0, D)[None, :], mask=(row < total)[:, None], other=0.0).to(tl.float32)
    tl.store(norm_ptr + row, tl.rsqrt(tl.sum(x * x, 1) * mean + EPS), mask=row < total)


@triton.jit
def sink_logit(sink_ptr, h):
    """The sink's logit to base 2; one so large that it would overflow there, or so small that nothing is left of it,
    stays a number."""
    logit = tl.load(sink_ptr + h).to(tl.float32) * LOG2E
    return tl.where(logit > 3e38, 3e38, tl.where(logit < -1e30, -1e30, logit))


@triton.jit
def softmax_start(sink_ptr, h, ROWS: tl.constexpr, SINK: tl.constexpr):
    """(highest, total) of an online softmax that has seen the sink, if there is one, and nothing else."""
    if SINK:
        highest = tl.zeros((ROWS,), tl.float32) + sink_logit(sink_ptr, h)
        total = tl.zeros((ROWS,), tl.float32) + 1.0
    else:
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
    return highest, total


@triton.jit
def softmax_step(logit, v, highest, total, o, EMPTY: tl.constexpr, PRECISION: tl.constexpr):
    """(highest, total, o) of an online softmax after a tile of logits [ROWS, COLUMNS] to base 2 and values
    [COLUMNS, V]. EMPTY: a row may have seen nothing yet."""
    new_highest = tl.maximum(highest, tl.max(logit, 1))
    if EMPTY:
        new_highest = tl.maximum(new_highest, -1e30)
    weight = tl.exp2(logit - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weight, 1)
    o = o * shrink[:, None]
    o = tl.dot(weight.to(v.dtype), v, o, input_precision=PRECISION)
    return new_highest, total, o


@triton.jit
def _scaled_queries(q_ptr, gamma_q_ptr, gamma_k_ptr, query_norm_ptr, staged_ptr, row_R, is_row, h, q_stride, H, mean,
                    dtype: tl.constexpr, K: tl.constexpr, STAGED: tl.constexpr, EPS: tl.constexpr):
    """(gamma_q gamma_k q [ROWS, K] in dtype, inverse norms of q [ROWS]) of the rows; the norms are stored."""
    d_K = tl.arange(0, K)
    gamma = tl.load(gamma_q_ptr + d_K).to(tl.float32) * tl.load(gamma_k_ptr + d_K).to(tl.float32)
    q = tl.load(q_ptr + (row_R * q_stride + h * K)[:, None] + d_K[None, :], mask=is_row[:, None], other=0.0)
    q = q.to(tl.float32)
    norm = tl.rsqrt(tl.sum(q * q, 1) * mean + EPS)
    tl.store(query_norm_ptr + row_R * H + h, norm, mask=is_row)
    q = (q * gamma[None, :]).to(dtype)
    if STAGED:  # a tile that was computed stays in registers as an operand, one that was loaded does not
        staged_at = staged_ptr + (row_R * H + h)[:, None] * K + d_K[None, :]
        tl.store(staged_at, q, mask=is_row[:, None])
        tl.debug_barrier()
        q = tl.load(staged_at, mask=is_row[:, None], other=0.0)
    return q, norm


@triton.jit
def _read_forward_kernel(q_ptr, k_ptr, v_ptr, key_norm_ptr, gamma_q_ptr, gamma_k_ptr, sink_ptr, gate_ptr,
                         o_state_ptr, slots_ptr, entries_ptr, y_ptr, o_cache_ptr, lse_ptr,
                         query_norm_ptr, staged_ptr,
                         q_stride, k_stride, v_stride, o_state_stride, H, w, mean, scale,
                         K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                         SLOT_TILES: tl.constexpr, ROW_TILES: tl.constexpr, SINK: tl.constexpr,
                         COMBINE: tl.constexpr, INCOMING: tl.constexpr, STAGED: tl.constexpr, EPS: tl.constexpr,
                         WINDOW: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr):
    """y, o_cache [M, H, V], lse [M, H] (log2, of all visible keys and the sink), query_norm [M, H].

    Shared memory: q' [ROWS, K] once, k and v tiles [COLUMNS, K or V] per stage.
    Registers: o [ROWS, V] float32, logits [ROWS, COLUMNS] float32, row maxima and sums.
    """
    tile = ROW_TILES - 1 - tl.program_id(0) % ROW_TILES  # the longest loops first
    h = (tl.program_id(0) // ROW_TILES) % H
    block = tl.program_id(0) // (ROW_TILES * H)
    start = block_entry(entries_ptr, block, START)
    count = block_entry(entries_ptr, block, COUNT)
    index = block_entry(entries_ptr, block, INDEX)
    if tile * ROWS < count:
        offset_R = tile * ROWS + tl.arange(0, ROWS)
        is_row = offset_R < count
        row_R = (start + offset_R).to(tl.int64)
        d_K, d_V, c_C = tl.arange(0, K), tl.arange(0, V), tl.arange(0, COLUMNS)
        dtype = k_ptr.dtype.element_ty

        slots_at = slots_ptr + (block.to(tl.int64) * H + h) * w
        slot_row = tl.load(slots_at + c_C, mask=c_C < w, other=-1)
        q, q_norm = _scaled_queries(q_ptr, gamma_q_ptr, gamma_k_ptr, query_norm_ptr, staged_ptr, row_R, is_row, h,
                                    q_stride, H, mean, dtype, K, STAGED, EPS)
        q_norm = q_norm * (scale * LOG2E)
        highest, total = softmax_start(sink_ptr, h, ROWS, SINK)
        o = tl.zeros((ROWS, V), tl.float32)
        first = 0 if INCOMING else tl.where(index > 0, 0, SLOT_TILES)  # the first block has no past
        last = SLOT_TILES + tl.cdiv(tl.minimum(count, (tile + 1) * ROWS), COLUMNS)
        if WINDOW > 0:
            local_first = first_window_tile(tile, index, ROWS, COLUMNS, WINDOW, BLOCK, BACK)
            last = last - local_first
        for t in tl.range(first, last):
            cached = t < SLOT_TILES
            offset_C = (t - SLOT_TILES) * COLUMNS + c_C
            if WINDOW > 0:
                offset_C += local_first * COLUMNS
            if SLOT_TILES > 1:
                slot_row = tl.load(slots_at + t * COLUMNS + c_C, mask=cached & (t * COLUMNS + c_C < w), other=-1)
            seen = tl.where(cached, slot_row >= 0, offset_C < count)
            row_C = tl.where(cached, slot_row, start + offset_C).to(tl.int64)
            k = tl.load(k_ptr + row_C[:, None] * k_stride + h * K + d_K[None, :], mask=seen[:, None], other=0.0)
            v = tl.load(v_ptr + row_C[:, None] * v_stride + h * V + d_V[None, :], mask=seen[:, None], other=0.0)
            key_norm = tl.load(key_norm_ptr + row_C * H + h, mask=seen, other=0.0)
            logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * q_norm[:, None] * key_norm[None, :]
            visible = seen[None, :] & (cached | (offset_C[None, :] <= offset_R[:, None]))
            if WINDOW > 0:
                visible = visible & in_reach(cached, row_C[None, :], row_R[:, None], WINDOW)
            logit = tl.where(visible, logit, float("-inf"))
            # without a sink nothing is visible yet in a first tile of empty slots only
            highest, total, o = softmax_step(logit, v, highest, total, o, not SINK, PRECISION)

        o = o * (1.0 / total)[:, None]
        at_H = row_R * H + h
        tl.store(lse_ptr + at_H, highest + tl.log2(total), mask=is_row)
        at = at_H[:, None] * V + d_V[None, :]
        tl.store(o_cache_ptr + at, o.to(o_cache_ptr.dtype.element_ty), mask=is_row[:, None])
        if COMBINE:
            share = tl.sigmoid(tl.load(gate_ptr + h).to(tl.float32))
            o_state = tl.load(o_state_ptr + row_R[:, None] * o_state_stride + h * V + d_V[None, :],
                              mask=is_row[:, None], other=0.0).to(tl.float32)
            tl.store(y_ptr + at, (o_state + share * o).to(y_ptr.dtype.element_ty), mask=is_row[:, None])


def launch_inverse_norms(*, x_MHD: Tensor, mean: float, eps: float = RMS_EPS) -> Tensor:
    """1 / sqrt(mean * |x|^2 + eps) of every row, [M, H] float32."""
    tokens, heads, dim = x_MHD.shape
    norm_MH = torch.empty(tokens, heads, dtype=torch.float32, device=x_MHD.device)
    rows = max(1, 8192 // dim)
    _inverse_norm_kernel[(cdiv(tokens * heads, rows),)](
        x_MHD, norm_MH, tokens * heads, heads, x_MHD.stride(0), mean, D=dim, ROWS=rows, EPS=eps,
        num_warps=4)
    return norm_MH


def launch_read_forward(*, q_MHK: Tensor, k_RHK: Tensor, v_RHV: Tensor, key_norm_RH: Tensor, gamma_q: Tensor,
                        gamma_k: Tensor, sink_H: Tensor | None, gate_H: Tensor | None, o_state_MHV: Tensor | None,
                        slots_UHw: Tensor, table: BlockTable, mean: float, incoming: bool, tile: Tile,
                        eps: float = RMS_EPS, window: Window = NO_WINDOW) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, o_cache, lse, inverse norms of q): y = o_state + sigmoid(gate) * o_cache, or o_cache itself without a gate.

    Rows R of k and v: the M tokens, and after them any rows that `slots` may name.
    """
    tokens, heads, key_dim = q_MHK.shape
    value_dim, slots = v_RHV.shape[2], slots_UHw.shape[2]
    o_cache = torch.empty(tokens, heads, value_dim, dtype=v_RHV.dtype, device=q_MHK.device)
    lse_MH = torch.empty(tokens, heads, dtype=torch.float32, device=q_MHK.device)
    query_norm_MH = torch.empty_like(lse_MH)
    combine = gate_H is not None
    y = torch.empty_like(o_cache) if combine else o_cache
    row_tiles = cdiv(table.size, tile.rows)
    unused = lse_MH
    staged_MHK = torch.empty(q_MHK.shape, dtype=k_RHK.dtype, device=q_MHK.device) if tile.staged else unused
    _read_forward_kernel[(table.count * heads * row_tiles,)](
        q_MHK, k_RHK, v_RHV, key_norm_RH, gamma_q, gamma_k, unused if sink_H is None else sink_H,
        gate_H if combine else unused, o_state_MHV if combine else unused, slots_UHw, table.entries, y, o_cache, lse_MH,
        query_norm_MH, staged_MHK, q_MHK.stride(0), k_RHK.stride(0), v_RHV.stride(0),
        o_state_MHV.stride(0) if combine else 0, heads, slots, mean, key_dim**-0.5, K=key_dim, V=value_dim,
        ROWS=tile.rows, COLUMNS=tile.columns, SLOT_TILES=cdiv(slots, tile.columns), ROW_TILES=row_tiles,
        SINK=sink_H is not None, COMBINE=combine, INCOMING=incoming, STAGED=tile.staged, EPS=eps,
        PRECISION="tf32x3", **window.constants, **tile.launch)
    return y, o_cache, lse_MH, query_norm_MH
