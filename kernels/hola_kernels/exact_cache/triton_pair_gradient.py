"""Cache attention, backward, first step: the weights P and the logit gradients of every visible pair.

With s = sigmoid(gate) (1 when not combined), r the inverse norms of queries and keys, and dy the
incoming gradient,
    delta_i = s dy_i . o_i        dS_ij = P_ij (s dy_i . v_j - delta_i)        D_ij = dS_ij r_i r_j
Everything the rest needs is a plain matrix product of P or D with rows as they are in memory:
    dv_j = s sum_i P_ij dy_i      g_i = K^-1/2 gamma sum_j D_ij k_j            (gamma = gamma_q gamma_k)
    dq_i = g_i - q_i (mean r_i^2 a_i),  a_i = g_i . q_i = sum_j dS_ij logit_ij,
and dk likewise from sum_i D_ij q_i. With a_i summed here, the product for dq needs no pass over
whole rows at its end, so it can be split along K. P and D are written once in the inputs' type
(58 MB each at the shape below) instead of being computed for each side: 5 matrix products in
all, not 7, and no product is transposed in registers.
Keeping dq in the same program was tried: its accumulator left one program a multiprocessor.

Work for (16, 2048, 4, 256, 64), K = V = 256, bf16: 4 * 224 * 256 FLOP a query and head = 30 GFLOP; HBM
reads q, k, v, dy, and o for delta (402 MB with dy twice), writes 116 MB: floor 0.12 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.block_table import BlockTable
from hola_kernels.descriptors import token_tiles
from hola_kernels.exact_cache.read_configs import Tile
from hola_kernels.exact_cache.triton_forward import LOG2E, NO_WINDOW, sink_logit
from hola_kernels.exact_cache.triton_window import Window, first_window_tile, in_reach
from hola_kernels.integers import cdiv
from hola_kernels.triton_block_table import COUNT, INDEX, START, block_entry

DELTA_ROWS = 32


@dataclass(frozen=True)
class PairGradient:
    """What the products for q, k and v are taken of. Tiles that no query sees are not written.

    weight, dlogit   P and D, [U, H, rows, columns]: slot_tiles tiles of slots, then the block's tokens
    along            [U, H, tiles of columns, rows] float32: sums of dS * logit, by query
    tile_columns     columns of a tile
    """

    weight: Tensor
    dlogit: Tensor
    along: Tensor
    tile_columns: int
    slot_tiles: int
    window: Window

    @property
    def scratch_shape(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.weight.shape[2], self.weight.shape[3]


@triton.jit
def _delta_kernel(dy_ptr, o_ptr, lse_ptr, sink_ptr, gate_ptr, delta_ptr, part_ptr, tokens, H, dy_stride,
                  V: tl.constexpr, ROWS: tl.constexpr, SINK: tl.constexpr, COMBINE: tl.constexpr):
    """delta [M, H]; part [tiles, H, 2]: a tile's sums for the gradients of sink and gate. dy, o in registers."""
    h = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < tokens
    d = tl.arange(0, V)
    at_H = row.to(tl.int64) * H + h
    dy = tl.load(dy_ptr + row.to(tl.int64)[:, None] * dy_stride + h * V + d[None, :], mask=is_row[:, None], other=0.0)
    o = tl.load(o_ptr + at_H[:, None] * V + d[None, :], mask=is_row[:, None], other=0.0)
    delta = tl.sum(dy.to(tl.float32) * o.to(tl.float32), 1)
    if COMBINE:
        delta *= tl.sigmoid(tl.load(gate_ptr + h).to(tl.float32))
    tl.store(delta_ptr + at_H, delta, mask=is_row)
    part = part_ptr + (tl.program_id(0) * H + h) * 2
    if SINK:
        lse = tl.load(lse_ptr + at_H, mask=is_row, other=float("inf"))
        tl.store(part, -tl.sum(tl.exp2(sink_logit(sink_ptr, h) - lse) * delta))
    else:
        tl.store(part, 0.0)
    tl.store(part + 1, tl.sum(delta))


@triton.jit
def _pair_gradient_kernel(q, k, v, dy, k_ptr, v_ptr, query_norm_ptr, key_norm_ptr, gamma_q_ptr, gamma_k_ptr,
                          gate_ptr, lse_ptr, delta_ptr, slots_ptr, entries_ptr, weight_ptr, dlogit_ptr,
                          along_ptr, k_stride, v_stride, H, w, scratch_rows, scratch_columns, scale, one,
                          K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
                          COLUMNS: tl.constexpr, SLOT_TILES: tl.constexpr, ROW_TILES: tl.constexpr,
                          COLUMN_TILES: tl.constexpr, CACHED: tl.constexpr, COMBINE: tl.constexpr,
                          INCOMING: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
                          PRECISION: tl.constexpr):
    """P and D [U, H, rows, columns] of one tile [ROWS queries, COLUMNS keys] of a block and head, and the
    tile's sums of dS * logit by query [U, H, COLUMN_TILES, rows].

    CACHED: the tiles of slots, whose rows are anywhere (k_ptr, v_ptr); otherwise those of the block's own tokens.
    Two products over K and V in steps of CHUNK. Shared memory: [ROWS, CHUNK] and [COLUMNS, CHUNK] per stage.
    Registers: two [ROWS, COLUMNS] float32, and scaled queries [ROWS, CHUNK].
    """
    TILES: tl.constexpr = SLOT_TILES if CACHED else COLUMN_TILES - SLOT_TILES
    FIRST: tl.constexpr = 0 if CACHED else SLOT_TILES
    t = tl.program_id(0) % TILES + FIRST
    tile = (tl.program_id(0) // TILES) % ROW_TILES
    h = (tl.program_id(0) // (TILES * ROW_TILES)) % H
    block = tl.program_id(0) // (TILES * ROW_TILES * H)
    start = block_entry(entries_ptr, block, START)
    count = block_entry(entries_ptr, block, COUNT)
    index = block_entry(entries_ptr, block, INDEX)
    first_offset = (t - SLOT_TILES) * COLUMNS
    if CACHED:
        wanted = INCOMING or index > 0
    else:
        wanted = first_offset < tl.minimum(count, (tile + 1) * ROWS)
        if WINDOW > 0:
            first_offset -= BACK
            wanted = (first_offset < tl.minimum(count, (tile + 1) * ROWS)) & (
                first_offset >= first_window_tile(tile, index, ROWS, COLUMNS, WINDOW, BLOCK, BACK) * COLUMNS)
    if wanted & (tile * ROWS < count):
        c_C, d_D = tl.arange(0, COLUMNS), tl.arange(0, CHUNK)
        offset_R = tile * ROWS + tl.arange(0, ROWS)
        is_row = offset_R < count
        first_row = start + tile * ROWS
        row_R = (start + offset_R).to(tl.int64)
        offset_C = first_offset + c_C
        if CACHED:
            slot = (block.to(tl.int64) * H + h) * w + t * COLUMNS + c_C
            slot_row = tl.load(slots_ptr + slot, mask=t * COLUMNS + c_C < w, other=-1)
            seen, row_C = slot_row >= 0, slot_row.to(tl.int64)
        else:
            seen, row_C = offset_C < count, (start + offset_C).to(tl.int64)
        dtype = weight_ptr.dtype.element_ty

        k_at = k_ptr + (row_C * k_stride + h * K)[:, None] + d_D[None, :]
        logit = tl.zeros((ROWS, COLUMNS), tl.float32)
        for d in tl.range(0, K, CHUNK):
            gamma = tl.load(gamma_q_ptr + d + d_D).to(tl.float32) * tl.load(gamma_k_ptr + d + d_D).to(tl.float32)
            scaled = (q.load([first_row, h * K + d]).to(tl.float32) * gamma[None, :]).to(dtype)
            if CACHED:
                key = tl.load(k_at + d, mask=seen[:, None], other=0.0)
            else:
                key = k.load([start + first_offset, h * K + d])
            # times one (a number the compiler does not know): no product is left running into the next step, where the
            # registers of its scaled queries would be written before anything waits for it (triton issue 9433)
            logit = tl.dot(scaled, tl.trans(key), logit, input_precision=PRECISION) * one

        v_at = v_ptr + (row_C * v_stride + h * V)[:, None] + d_D[None, :]
        dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
        for d in tl.range(0, V, CHUNK):
            if CACHED:
                value = tl.load(v_at + d, mask=seen[:, None], other=0.0)
            else:
                value = v.load([start + first_offset, h * V + d])
            dweight = tl.dot(dy.load([first_row, h * V + d]), tl.trans(value), dweight, input_precision=PRECISION)

        query_norm = tl.load(query_norm_ptr + row_R * H + h, mask=is_row, other=0.0)
        key_norm = tl.load(key_norm_ptr + row_C * H + h, mask=seen, other=0.0)
        lse = tl.load(lse_ptr + row_R * H + h, mask=is_row, other=float("inf"))
        delta = tl.load(delta_ptr + row_R * H + h, mask=is_row, other=0.0)
        norms = query_norm[:, None] * key_norm[None, :]
        logit = logit * (norms * scale)
        visible = seen[None, :] & is_row[:, None]
        if not CACHED:
            visible = visible & (offset_C[None, :] <= offset_R[:, None])
        if WINDOW > 0:
            visible = visible & in_reach(CACHED, row_C[None, :], row_R[:, None], WINDOW)
        weight = tl.where(visible, tl.exp2(logit * LOG2E - lse[:, None]), 0.0)
        if COMBINE:
            dweight *= tl.sigmoid(tl.load(gate_ptr + h).to(tl.float32))
        # chosen, not multiplied by zero: rows of the tiles may be another document's, and infinite
        dlogit = tl.where(visible, weight * (dweight - delta[:, None]), 0.0)
        base = block.to(tl.int64) * H + h
        out = base * scratch_rows * scratch_columns + t * COLUMNS
        at = offset_R[:, None] * scratch_columns + c_C[None, :]
        tl.store(weight_ptr + out + at, weight.to(dtype))
        tl.store(dlogit_ptr + out + at, (dlogit * norms).to(dtype))
        along = along_ptr + (base * COLUMN_TILES + t) * scratch_rows + offset_R
        tl.store(along, tl.sum(tl.where(visible, dlogit * logit, 0.0), 1))


def launch_delta(*, dy_MHV: Tensor, o_cache_MHV: Tensor, lse_MH: Tensor, sink_H: Tensor | None,
                 gate_H: Tensor | None) -> tuple[Tensor, Tensor]:
    """(delta [M, H], partial sums [tiles, H, 2] of the gradients of sink and of the gate's sigmoid times itself)."""
    tokens, heads, value_dim = dy_MHV.shape
    tiles = cdiv(tokens, DELTA_ROWS)
    delta_MH = torch.empty_like(lse_MH)
    part = torch.empty(tiles, heads, 2, dtype=torch.float32, device=dy_MHV.device)
    _delta_kernel[(tiles, heads)](
        dy_MHV, o_cache_MHV, lse_MH, lse_MH if sink_H is None else sink_H, lse_MH if gate_H is None else gate_H,
        delta_MH, part, tokens, heads, dy_MHV.stride(0), V=value_dim, ROWS=DELTA_ROWS, SINK=sink_H is not None,
        COMBINE=gate_H is not None, num_warps=4)
    return delta_MH, part


def launch_pair_gradient(*, q_MHK: Tensor, k_RHK: Tensor, v_RHV: Tensor, dy_MHV: Tensor, query_norm_MH: Tensor,
                         key_norm_RH: Tensor, gamma_q: Tensor, gamma_k: Tensor, gate_H: Tensor | None, lse_MH: Tensor,
                         delta_MH: Tensor, slots_UHw: Tensor, table: BlockTable, incoming: bool,
                         tile: Tile, window: Window = NO_WINDOW) -> PairGradient:
    """A launch over all tiles of queries and slots of all blocks, and one over all tiles of queries and own tokens."""
    heads, key_dim = q_MHK.shape[1:]
    value_dim, slots = v_RHV.shape[2], slots_UHw.shape[2]
    row_tiles, slot_tiles = cdiv(table.size, tile.rows), cdiv(slots, tile.columns)
    column_tiles = slot_tiles + cdiv(window.back + table.size, tile.columns)
    shape = (table.count, heads, row_tiles * tile.rows, column_tiles * tile.columns)
    weight, dlogit = (torch.empty(shape, dtype=k_RHK.dtype, device=q_MHK.device) for _ in range(2))
    along = torch.empty(*shape[:2], column_tiles, shape[2], dtype=torch.float32, device=q_MHK.device)
    chunk = min(64, key_dim, value_dim)
    sides = [(True, slot_tiles)] if slots else []
    for cached, tiles in (*sides, (False, column_tiles - slot_tiles)):
        _pair_gradient_kernel[(table.count * heads * row_tiles * tiles,)](
            token_tiles(q_MHK, tile.rows, chunk), token_tiles(k_RHK, tile.columns, chunk),
            token_tiles(v_RHV, tile.columns, chunk), token_tiles(dy_MHV, tile.rows, chunk), k_RHK, v_RHV,
            query_norm_MH, key_norm_RH, gamma_q, gamma_k, lse_MH if gate_H is None else gate_H, lse_MH, delta_MH,
            slots_UHw, table.entries, weight, dlogit, along, k_RHK.stride(0), v_RHV.stride(0), heads, slots, *shape[2:],
            key_dim**-0.5, 1.0, K=key_dim, V=value_dim, CHUNK=chunk, ROWS=tile.rows, COLUMNS=tile.columns,
            SLOT_TILES=slot_tiles, ROW_TILES=row_tiles, COLUMN_TILES=column_tiles, CACHED=cached,
            COMBINE=gate_H is not None, INCOMING=incoming, PRECISION="tf32x3", **window.constants,
            **tile.launch)
    return PairGradient(weight, dlogit, along, tile.columns, slot_tiles, window)
