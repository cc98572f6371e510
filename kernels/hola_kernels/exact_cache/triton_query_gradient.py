"""Cache attention, backward: dq from the logit gradients D of `triton_pair_gradient`.

    g_i = K^-1/2 gamma sum_j D_ij k_j         dq_i = g_i - q_i (mean r_i^2 a_i),   a_i = sum_j dS_ij logit_ij
The gammas need one sum only, X = K^-1/2 sum_i (sum_j D_ij k_j) q_i, taken here: d gamma_q = gamma_k X
and d gamma_k = gamma_q X.

Work for (16, 2048, 4, 256, 64), K = 256, bf16: 15 GFLOP; HBM reads D, k, q, writes dq (260 MB): 0.06 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.block_table import BlockTable
from hola_kernels.descriptors import tiles_of, token_tiles
from hola_kernels.exact_cache.read_configs import PRODUCT_WIDTH, Tile
from hola_kernels.exact_cache.triton_pair_gradient import PairGradient
from hola_kernels.exact_cache.triton_window import first_window_tile
from hola_kernels.integers import cdiv, next_power_of_2
from hola_kernels.triton_block_table import COUNT, INDEX, START, block_entry


@triton.jit
def _query_gradient_kernel(dlogit, k, along_ptr, q_ptr, k_ptr, query_norm_ptr, gamma_q_ptr, gamma_k_ptr, slots_ptr,
                           entries_ptr, dq_ptr, part_ptr, q_stride, k_stride, H, w, scratch_rows, mean,
                           scale, K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                           SLOT_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr, SUMS: tl.constexpr,
                           ROW_TILES: tl.constexpr, INCOMING: tl.constexpr, ADD: tl.constexpr, WINDOW: tl.constexpr,
                           BLOCK: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr):
    """dq [M, H, K] and part [U * H * ROW_TILES, K] of X: one program owns [ROWS] queries and WIDTH columns of K.

    Registers: dq [ROWS, WIDTH] float32. Shared memory: D [ROWS, COLUMNS] and k [COLUMNS, WIDTH] per stage.
    ADD: dq holds another gradient of q, to which this one is added.
    """
    d_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    tile = ROW_TILES - 1 - tl.program_id(0) % ROW_TILES  # the longest loops first
    h = (tl.program_id(0) // ROW_TILES) % H
    block = tl.program_id(0) // (ROW_TILES * H)
    start = block_entry(entries_ptr, block, START)
    count = block_entry(entries_ptr, block, COUNT)
    index = block_entry(entries_ptr, block, INDEX)
    c_C = tl.arange(0, COLUMNS)
    base = block.to(tl.int64) * H + h
    part = part_ptr + tl.program_id(0).to(tl.int64) * K + d_W
    if tile * ROWS >= count:
        tl.store(part, tl.zeros((WIDTH,), tl.float32))
    else:
        offset_R = tile * ROWS + tl.arange(0, ROWS)
        is_row = offset_R < count
        row_R = (start + offset_R).to(tl.int64)
        slot_tiles = SLOT_TILES if INCOMING else tl.where(index > 0, SLOT_TILES, 0)
        last = SLOT_TILES + tl.cdiv(tl.minimum(count, (tile + 1) * ROWS), COLUMNS)
        local_first = 0
        if WINDOW > 0:
            local_first = first_window_tile(tile, index, ROWS, COLUMNS, WINDOW, BLOCK, BACK)
            last += BACK // COLUMNS
        t_S = tl.arange(0, SUMS)[:, None]
        seen = ((t_S >= SLOT_TILES) | (t_S < slot_tiles)) & (t_S < last) & is_row[None, :]
        if WINDOW > 0:
            seen = seen & ((t_S < slot_tiles) | (t_S >= SLOT_TILES + BACK // COLUMNS + local_first))
        along = tl.load(along_ptr + (base * COLUMN_TILES + t_S) * scratch_rows + offset_R[None, :], mask=seen,
                        other=0.0)
        norm = tl.load(query_norm_ptr + row_R * H + h, mask=is_row, other=0.0)
        along = tl.sum(along, 0) * norm * norm * mean

        scratch_row = (block * H + h) * scratch_rows + tile * ROWS
        dq = tl.zeros((ROWS, WIDTH), tl.float32)
        for t in tl.range(0, slot_tiles, num_stages=1):
            slot = t * COLUMNS + c_C
            slot_row = tl.load(slots_ptr + base * w + slot, mask=slot < w, other=-1)
            key = tl.load(k_ptr + (slot_row.to(tl.int64) * k_stride + h * K)[:, None] + d_W[None, :],
                          mask=(slot_row >= 0)[:, None], other=0.0)
            dq = tl.dot(dlogit.load([scratch_row, t * COLUMNS]), key, dq, input_precision=PRECISION)
        limit = tl.minimum(count, (tile + 1) * ROWS)
        whole = tl.minimum(limit, count // COLUMNS * COLUMNS)
        for offset in tl.range(local_first * COLUMNS, whole, COLUMNS):
            dq = tl.dot(dlogit.load([scratch_row, SLOT_TILES * COLUMNS + BACK + offset]),
                        k.load([start + offset, h * K + tl.program_id(1) * WIDTH]), dq, input_precision=PRECISION)
        if whole < limit:  # keys after the block's end are another document's: zeros in D do not stop infinite ones
            key = k.load([start + whole, h * K + tl.program_id(1) * WIDTH])
            key = tl.where((whole + c_C < count)[:, None], key, 0.0).to(key.dtype)
            dq = tl.dot(dlogit.load([scratch_row, SLOT_TILES * COLUMNS + BACK + whole]), key, dq,
                        input_precision=PRECISION)

        gamma = tl.load(gamma_q_ptr + d_W).to(tl.float32) * tl.load(gamma_k_ptr + d_W).to(tl.float32)
        q = tl.load(q_ptr + (row_R * q_stride + h * K)[:, None] + d_W[None, :], mask=is_row[:, None], other=0.0)
        q = q.to(tl.float32)
        tl.store(part, tl.sum(dq * q, 0) * scale)
        dq = dq * (gamma * scale)[None, :] - q * along[:, None]
        out = dq_ptr + (row_R * H + h)[:, None] * K + d_W[None, :]
        if ADD:
            dq += tl.load(out, mask=is_row[:, None], other=0.0).to(tl.float32)
        tl.store(out, dq.to(dq_ptr.dtype.element_ty), mask=is_row[:, None])


def launch_query_gradient(*, pairs: PairGradient, q_MHK: Tensor, k_RHK: Tensor, query_norm_MH: Tensor,
                          gamma_q: Tensor, gamma_k: Tensor, slots_UHw: Tensor, table: BlockTable, mean: float,
                          incoming: bool, dq_MHK: Tensor, add: bool, tile: Tile) -> Tensor:
    """Fills (or adds to) dq; returns partial sums [P, K] of X. tile.columns: those of the pairs."""
    heads, key_dim = q_MHK.shape[1:]
    width = min(key_dim, PRODUCT_WIDTH)
    row_tiles, column_tiles = cdiv(table.size, tile.rows), pairs.along.shape[2]
    programs = table.count * heads * row_tiles
    part = torch.empty(programs, key_dim, dtype=torch.float32, device=q_MHK.device)
    _query_gradient_kernel[(programs, key_dim // width)](
        tiles_of(pairs.dlogit, pairs.scratch_shape[1], tile.rows, tile.columns),
        token_tiles(k_RHK, tile.columns, width), pairs.along, q_MHK, k_RHK, query_norm_MH, gamma_q, gamma_k, slots_UHw,
        table.entries, dq_MHK, part, q_MHK.stride(0), k_RHK.stride(0), heads, slots_UHw.shape[2],
        pairs.scratch_shape[0], mean, key_dim**-0.5, K=key_dim, WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns,
        SLOT_TILES=pairs.slot_tiles, COLUMN_TILES=column_tiles, SUMS=next_power_of_2(column_tiles),
        ROW_TILES=row_tiles, INCOMING=incoming, ADD=add, PRECISION="tf32x3", **pairs.window.constants,
        **tile.launch)
    return part
