"""Exact read, backward: dk and dv of every token, from every block that saw it.

    dv_j = s sum_i P_ij dy_i          dk_j = g_j - k_j (mean r_j^2 a_j),   g_j = K^-1/2 gamma sum_i D_ij q_i
with P, D and the sums a of `triton_pair_gradient`. A token is read by its own block and, while it is cached,
by a run of later blocks. No float atomics: three steps in a fixed order,

    slot sums    per block and slot, the sum over the block's queries     -> parts [U, H, w, D]
    run sums     the part where a token enters its first cache takes in the parts of the rest of its run
    own sums     the sum over the own block's queries + the run's part, keys then through their norm

The first and the last are plain products, cut along K or V into programs of WIDTH columns.

Work for (16, 2048, 4, 256, 64), K = V = 256, bf16: 30 GFLOP; HBM reads P, D (116 MB), dy, q, k (201
MB), writes dk, dv (134 MB), parts 67 MB written and read: floor 0.13 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.exact_cache.read_configs import PRODUCT_WIDTH, Tile
from hola_kernels.exact_cache.triton_pair_gradient import PairGradient
from hola_kernels.unit_table import UnitTable


@triton.jit
def _sum_over_queries(acc, scratch_ptr, x_ptr, at, column_C, start, count, first_row, x_stride, offset_W,
                      scratch_columns, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """acc [COLUMNS, WIDTH] += sum over the block's queries from first_row on of scratch[query, column] * x[query].

    Columns without a token hold anything: they reach their own row of acc only, which nobody stores.
    """
    for row in tl.range(first_row, count, ROWS):
        place_R = row + tl.arange(0, ROWS)
        is_row = place_R < count
        part = tl.load(scratch_ptr + at + place_R[:, None] * scratch_columns + column_C[None, :],
                       mask=is_row[:, None], other=0.0)
        x = tl.load(x_ptr + ((start + place_R).to(tl.int64) * x_stride)[:, None] + offset_W[None, :],
                    mask=is_row[:, None], other=0.0)
        acc = tl.dot(tl.trans(part), x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _slot_sums_kernel(scratch_ptr, along_ptr, x_ptr, units_ptr, part_ptr, along_part_ptr, x_stride, H, w,
                      scratch_rows, scratch_columns, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                      COLUMNS: tl.constexpr, TILES: tl.constexpr, PAIR_ROWS: tl.constexpr,
                      ROW_TILES: tl.constexpr, SUMS: tl.constexpr, KEYS: tl.constexpr, INCOMING: tl.constexpr,
                      PRECISION: tl.constexpr):
    """part [U, H, w, D] = sum_i scratch[i, slot] x_i, and for keys along_part [U, H, w].

    One program owns [COLUMNS] slots and WIDTH columns of D. Registers: acc [COLUMNS, WIDTH] float32.
    Shared memory: scratch [ROWS, COLUMNS] and x [ROWS, WIDTH] per stage.
    """
    tile = tl.program_id(0) % TILES
    h = (tl.program_id(0) // TILES) % H
    unit = tl.program_id(0) // (TILES * H)
    start = tl.load(units_ptr + unit * 5)
    count = tl.load(units_ptr + unit * 5 + 1)
    ordinal = tl.load(units_ptr + unit * 5 + 2)
    if (count > 0) & (INCOMING or ordinal > 0):
        d_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        base = unit.to(tl.int64) * H + h
        acc = tl.zeros((COLUMNS, WIDTH), tl.float32)
        acc = _sum_over_queries(acc, scratch_ptr, x_ptr, base * scratch_rows * scratch_columns, column, start, count,
                                0, x_stride, h * D + d_W, scratch_columns, ROWS, PRECISION)
        out = part_ptr + (base * w + column)[:, None] * D + d_W[None, :]
        tl.store(out, acc.to(part_ptr.dtype.element_ty), mask=(column < w)[:, None])
        if KEYS:
            t_S = tl.arange(0, SUMS)[:, None]
            along = tl.load(along_ptr + (base * ROW_TILES + t_S) * scratch_columns + column[None, :],
                            mask=(t_S * PAIR_ROWS < count) & (t_S < ROW_TILES) & (column < w)[None, :], other=0.0)
            tl.store(along_part_ptr + base * w + column, tl.sum(along, 0), mask=(column < w) & (tl.program_id(1) == 0))


@triton.jit
def _run_sums_kernel(slots_ptr, units_ptr, k_part_ptr, v_part_ptr, along_part_ptr, H, w, block, tokens,
                     K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr):
    """The parts of a token's run summed into the part of the block where it enters, in order of blocks.

    One program owns GROUP slots of a block and head, and of those the ones whose token is new there: it is
    the only one to read or write the parts of these tokens. Registers: [GROUP, K] and [GROUP, V] float32.
    """
    groups = tl.cdiv(w, GROUP)
    group = tl.program_id(0) % groups
    h = (tl.program_id(0) // groups) % H
    unit = tl.program_id(0) // (groups * H)
    start = tl.load(units_ptr + unit * 5)
    ordinal = tl.load(units_ptr + unit * 5 + 2)
    following = tl.load(units_ptr + unit * 5 + 3)
    slot_G = group * GROUP + tl.arange(0, GROUP)
    slot_S = tl.arange(0, SLOTS)
    d_K, d_V = tl.arange(0, K), tl.arange(0, V)
    at = (unit.to(tl.int64) * H + h) * w + slot_G
    row_G = tl.load(slots_ptr + at, mask=slot_G < w, other=-1)
    enters = ((row_G >= start - block) & (row_G < start)) | ((ordinal == 0) & (row_G >= tokens))
    enters = enters & (row_G >= 0)
    # the longest run first, then a counted loop: its loads wait for nothing, and Triton 3.6 and 3.7 do not
    # compile a while loop that carries all three sums
    steps = 0
    more = tl.max(enters.to(tl.int32)) * following  # nothing to add for the last block of a sequence
    while more > 0:
        later = ((unit + steps + 1).to(tl.int64) * H + h) * w
        row_S = tl.load(slots_ptr + later + slot_S, mask=slot_S < w, other=-1)
        same = enters[:, None] & (row_G[:, None] == row_S[None, :])
        held = tl.max(tl.max(same.to(tl.int32), 1))
        steps += held
        more = held * (following - steps)
    if steps > 0:
        k_at = k_part_ptr + at[:, None] * K + d_K[None, :]
        v_at = v_part_ptr + at[:, None] * V + d_V[None, :]
        dk = tl.load(k_at, mask=enters[:, None], other=0.0).to(tl.float32)
        dv = tl.load(v_at, mask=enters[:, None], other=0.0).to(tl.float32)
        along = tl.load(along_part_ptr + at, mask=enters, other=0.0)
        for step in tl.range(1, steps + 1):
            later = (tl.cast(unit + step, tl.int64) * H + h) * w
            row_S = tl.load(slots_ptr + later + slot_S, mask=slot_S < w, other=-1)
            same = enters[:, None] & (row_G[:, None] == row_S[None, :])
            slot = tl.max(tl.where(same, slot_S[None, :], -1), 1)
            held = slot >= 0
            dk += tl.load(k_part_ptr + (later + slot)[:, None] * K + d_K[None, :], mask=held[:, None],
                          other=0.0).to(tl.float32)
            dv += tl.load(v_part_ptr + (later + slot)[:, None] * V + d_V[None, :], mask=held[:, None],
                          other=0.0).to(tl.float32)
            along += tl.load(along_part_ptr + later + slot, mask=held, other=0.0)
        tl.store(k_at, dk.to(k_part_ptr.dtype.element_ty), mask=enters[:, None])
        tl.store(v_at, dv.to(v_part_ptr.dtype.element_ty), mask=enters[:, None])
        tl.store(along_part_ptr + at, along, mask=enters)


@triton.jit
def _own_sums_kernel(scratch_ptr, along_ptr, x_ptr, part_ptr, along_part_ptr, slots_ptr, units_ptr, first_unit_ptr,
                     k_ptr, key_norm_ptr, gamma_q_ptr, gamma_k_ptr, gate_ptr, out_ptr, x_stride, k_stride, H, w,
                     tokens, units, scratch_rows, scratch_columns, own_column, mean, scale, D: tl.constexpr,
                     WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
                     SLOTS: tl.constexpr, PAIR_ROWS: tl.constexpr, PAIR_COLUMNS: tl.constexpr,
                     ROW_TILES: tl.constexpr, SUMS: tl.constexpr, KEYS: tl.constexpr, GATED: tl.constexpr,
                     ADD: tl.constexpr, PRECISION: tl.constexpr):
    """WIDTH columns of dk (KEYS) or dv of [COLUMNS] tokens of a block; behind the blocks, of incoming cache rows.

    Registers: acc [COLUMNS, WIDTH] float32. Shared memory: scratch [ROWS, COLUMNS], x [ROWS, WIDTH] per stage.
    """
    tile = tl.program_id(0) % TILES  # the longest walks first: early tokens are seen by most queries
    h = (tl.program_id(0) // TILES) % H
    unit = tl.program_id(0) // (TILES * H)
    place_C = tile * COLUMNS + tl.arange(0, COLUMNS)
    d_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if unit < units:
        start = tl.load(units_ptr + unit * 5)
        count = tl.load(units_ptr + unit * 5 + 1)
        queries = count
        reader = unit + 1  # the first block that can hold these tokens in its cache
        readers = tl.load(units_ptr + unit * 5 + 3)
    else:
        segment = unit - units
        start = tokens + segment * w
        count = w
        queries = 0
        reader = tl.load(first_unit_ptr + segment).to(tl.int32)
        readers = tl.load(first_unit_ptr + segment + 1).to(tl.int32) - reader
    if tile * COLUMNS < count:
        is_column = place_C < count
        row_C = (start + place_C).to(tl.int64)
        base = unit.to(tl.int64) * H + h
        reader_at = (reader.to(tl.int64) * H + h) * w
        slot_S = tl.arange(0, SLOTS)
        row_S = tl.load(slots_ptr + reader_at + slot_S, mask=(readers > 0) & (slot_S < w), other=-1)
        same = (start + place_C)[:, None] == row_S[None, :]
        slot = tl.max(tl.where(same, slot_S[None, :], -1), 1)
        held = is_column & (slot >= 0)
        if KEYS:
            t_S = tl.arange(0, SUMS)[:, None]
            seen = (place_C // PAIR_COLUMNS * PAIR_COLUMNS)[None, :] < (t_S + 1) * PAIR_ROWS
            along = tl.load(along_ptr + (base * ROW_TILES + t_S) * scratch_columns + (own_column + place_C)[None, :],
                            mask=seen & (t_S * PAIR_ROWS < queries) & (t_S < ROW_TILES) & is_column[None, :],
                            other=0.0)
            norm = tl.load(key_norm_ptr + row_C * H + h, mask=is_column, other=0.0)
            along = tl.sum(along, 0) + tl.load(along_part_ptr + reader_at + slot, mask=held, other=0.0)
            along = along * norm * norm * mean

        acc = tl.zeros((COLUMNS, WIDTH), tl.float32)
        acc = _sum_over_queries(acc, scratch_ptr, x_ptr, base * scratch_rows * scratch_columns, own_column + place_C,
                                start, queries, tile * COLUMNS, x_stride, h * D + d_W, scratch_columns, ROWS,
                                PRECISION)
        acc += tl.load(part_ptr + (reader_at + slot)[:, None] * D + d_W[None, :], mask=held[:, None],
                       other=0.0).to(tl.float32)
        if KEYS:
            gamma = tl.load(gamma_q_ptr + d_W).to(tl.float32) * tl.load(gamma_k_ptr + d_W).to(tl.float32)
            k = tl.load(k_ptr + (row_C * k_stride + h * D)[:, None] + d_W[None, :], mask=is_column[:, None], other=0.0)
            acc = acc * (gamma * scale)[None, :] - k.to(tl.float32) * along[:, None]
        elif GATED:
            acc = acc * tl.sigmoid(tl.load(gate_ptr + h).to(tl.float32))
        out = out_ptr + (row_C * H + h)[:, None] * D + d_W[None, :]
        if ADD:
            acc += tl.load(out, mask=is_column[:, None], other=0.0).to(tl.float32)
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=is_column[:, None])


def launch_key_gradient(*, pairs: PairGradient, q_MHK: Tensor, k_RHK: Tensor, key_norm_RH: Tensor, dy_MHV: Tensor,
                        gamma_q: Tensor, gamma_k: Tensor, gate_H: Tensor | None, slots_UHw: Tensor, units: UnitTable,
                        mean: float, incoming: bool, dk_RHK: Tensor, dv_RHV: Tensor, add: bool, tile: Tile) -> None:
    """Fills (or adds to) dk [R, H, K] and dv [R, H, V]."""
    tokens, heads, key_dim = q_MHK.shape
    slots, row_tiles = slots_UHw.shape[2], pairs.key_along.shape[2]
    shared = {"ROWS": tile.rows, "COLUMNS": tile.columns, "PAIR_ROWS": pairs.rows, "ROW_TILES": row_tiles,
              "SUMS": triton.next_power_of_2(row_tiles), "PRECISION": "tf32x3", **tile.launch}
    sides = [(pairs.dlogit, q_MHK, dk_RHK, True), (pairs.weight, dy_MHV, dv_RHV, False)]
    along_part = torch.empty(units.units, heads, slots, dtype=torch.float32, device=k_RHK.device)
    parts = []
    slot_tiles = triton.cdiv(slots, tile.columns)
    for scratch, x, out, keys in sides:
        dim = out.shape[2]
        width = min(dim, PRODUCT_WIDTH)
        part = torch.empty(units.units, heads, slots, dim, dtype=k_RHK.dtype, device=k_RHK.device)
        _slot_sums_kernel[(units.units * heads * slot_tiles, dim // width)](
            scratch, pairs.key_along, x, units.table, part, along_part, x.stride(0), heads, slots, *pairs.scratch,
            D=dim, WIDTH=width, TILES=slot_tiles, KEYS=keys, INCOMING=incoming, **shared)
        parts.append(part)
    group, padded = min(8, triton.next_power_of_2(slots)), triton.next_power_of_2(slots)
    _run_sums_kernel[(units.units * heads * triton.cdiv(slots, group),)](
        slots_UHw, units.table, *parts, along_part, heads, slots, units.size, tokens, K=key_dim, V=dv_RHV.shape[2],
        GROUP=group, SLOTS=padded, num_warps=2)
    own_tiles = triton.cdiv(max(units.size, slots if incoming else 0), tile.columns)
    owners = units.units + (units.first.numel() - 1 if incoming else 0)
    for (scratch, x, out, keys), part in zip(sides, parts, strict=True):
        dim = out.shape[2]
        width = min(dim, PRODUCT_WIDTH)
        _own_sums_kernel[(owners * heads * own_tiles, dim // width)](
            scratch, pairs.key_along, x, part, along_part, slots_UHw, units.table, units.first, k_RHK, key_norm_RH,
            gamma_q, gamma_k, gamma_q if gate_H is None else gate_H, out, x.stride(0), k_RHK.stride(0), heads, slots,
            tokens, units.units, *pairs.scratch, pairs.slot_tiles * pairs.columns, mean, key_dim**-0.5, D=dim,
            WIDTH=width, TILES=own_tiles, SLOTS=padded, PAIR_COLUMNS=pairs.columns, KEYS=keys,
            GATED=gate_H is not None, ADD=add, **shared)
