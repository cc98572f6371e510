"""Cache attention, backward: dk and dv of every token, from every block that saw it.

    dv_j = s sum_i P_ij dy_i          dk_j = g_j - k_j (mean r_j^2 g_j . k_j),   g_j = K^-1/2 gamma sum_i D_ij q_i
with P and D of `triton_pair_gradient`. A token is read by its local block and, while it is cached,
by a run of later blocks. No float atomics: three steps in a fixed order,

    slot sums    per block and slot, the sum over the block's queries     -> parts [U, H, w, D]
    run sums     the part where a token enters its first cache takes in the parts of the rest of its run: within
                 windows of blocks, then over windows, so that no chain of loads is as long as a sequence
    local sums   the sum over the local block's queries + the run's part, keys then through their norm

Work for (16, 2048, 4, 256, 64), K = V = 256, bf16: 30 GFLOP; HBM reads P, D (116 MB), dy, q, k (201
MB), writes dk, dv (134 MB), parts 67 MB written and read: floor 0.13 ms. Programs of half the columns
(more of them on a multiprocessor, each token's g . k summed beforehand) were not faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.block_table import BlockTable
from hola_kernels.descriptors import tiles_of, token_tiles
from hola_kernels.exact_cache.read_configs import Tile
from hola_kernels.exact_cache.triton_pair_gradient import PairGradient
from hola_kernels.integers import cdiv, next_power_of_2
from hola_kernels.triton_block_table import COUNT, FOLLOWING, INDEX, START, block_entry

RUN_WINDOW = 16  # blocks; of 512 in a sequence no sum has more than 15 + 32 terms one after the other


@triton.jit
def _sum_over_queries(acc, scratch, x, scratch_row, column, start, count, first_row, x_column,
                      ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """acc [COLUMNS, D] += sum over the block's queries from first_row on of scratch[query, column] * x[query].

    Columns without a token hold anything: they reach their own row of acc only, which nobody stores. Queries after
    the block's end hold zeros, and their rows of x, another document's and perhaps infinite, are made zeros.
    """
    whole = first_row + tl.maximum(count - first_row, 0) // ROWS * ROWS
    for row in tl.range(first_row, whole, ROWS):
        part = scratch.load([scratch_row + row, column])
        acc = tl.dot(tl.trans(part), x.load([start + row, x_column]), acc, input_precision=PRECISION)
    if whole < count:
        rows = x.load([start + whole, x_column])
        rows = tl.where((whole + tl.arange(0, ROWS) < count)[:, None], rows, 0.0).to(rows.dtype)
        part = scratch.load([scratch_row + whole, column])
        acc = tl.dot(tl.trans(part), rows, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _sum_over_later_blocks(acc, scratch, x, entries_ptr, block, readers, h, H, scratch_rows, column, offset, start,
                           x_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
                           BLOCK: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr):
    """acc [COLUMNS, D] += the same sum over queries of later blocks whose sliding window reaches back to these keys.

    offset: of the first key in its block. readers: how many blocks of the document come after it.
    """
    for back in tl.range(BLOCK, BACK + BLOCK, BLOCK):
        later = block + back // BLOCK
        if back // BLOCK <= readers:
            near = tl.minimum(block_entry(entries_ptr, later, COUNT), offset + COLUMNS - 1 + WINDOW - back)
            acc = _sum_over_queries(acc, scratch, x, (later * H + h) * scratch_rows, column - back, start + back, near,
                                    0, x_column, ROWS, PRECISION)
    return acc


@triton.jit
def _slot_sums_kernel(scratch, x, entries_ptr, part_ptr, H, w, scratch_rows,
                      D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
                      INCOMING: tl.constexpr, PRECISION: tl.constexpr):
    """part [U, H, w, D] = sum_i scratch[i, slot] x_i; one program owns [COLUMNS] slots of a block and head.

    Registers: acc [COLUMNS, D] float32. Shared memory: scratch [ROWS, COLUMNS] and x [ROWS, D] per stage.
    """
    tile = tl.program_id(0) % TILES
    h = (tl.program_id(0) // TILES) % H
    block = tl.program_id(0) // (TILES * H)
    start = block_entry(entries_ptr, block, START)
    count = block_entry(entries_ptr, block, COUNT)
    index = block_entry(entries_ptr, block, INDEX)
    if INCOMING or index > 0:
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        acc = tl.zeros((COLUMNS, D), tl.float32)
        acc = _sum_over_queries(acc, scratch, x, (block * H + h) * scratch_rows, tile * COLUMNS, start, count, 0,
                                h * D, ROWS, PRECISION)
        out = part_ptr + ((block.to(tl.int64) * H + h) * w + column)[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(out, acc.to(part_ptr.dtype.element_ty), mask=(column < w)[:, None])


@triton.jit
def _run_sums_kernel(slots_ptr, entries_ptr, k_part_ptr, v_part_ptr, H, w, block_size, tokens, K: tl.constexpr,
                     V: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, WINDOW: tl.constexpr,
                     ACROSS: tl.constexpr):
    """The parts of a token's run summed into the part of the block where it enters, in order of blocks.

    A window is WINDOW blocks of a segment. Within windows first: each sums into the part of the block where the token
    enters, or of the window's first. ACROSS, those into the part where it enters.

    One program owns GROUP slots of a block and head, and of those the ones whose token begins there: it is
    the only one to read or write the parts of these tokens. Registers: [GROUP, K] and [GROUP, V] float32.
    """
    groups = tl.cdiv(w, GROUP)
    group = tl.program_id(0) % groups
    h = (tl.program_id(0) // groups) % H
    block = tl.program_id(0) // (groups * H)
    start = block_entry(entries_ptr, block, START)
    index = block_entry(entries_ptr, block, INDEX)
    following = block_entry(entries_ptr, block, FOLLOWING)
    slot_G = group * GROUP + tl.arange(0, GROUP)
    slot_S = tl.arange(0, SLOTS)
    d_K, d_V = tl.arange(0, K), tl.arange(0, V)
    base = block.to(tl.int64) * H + h
    row_G = tl.load(slots_ptr + base * w + slot_G, mask=slot_G < w, other=-1)
    begins = ((row_G >= start - block_size) & (row_G < start)) | ((index == 0) & (row_G >= tokens))
    window_offset = index % WINDOW
    if not ACROSS:
        begins = begins | (window_offset == 0)
    begins = begins & (row_G >= 0)
    step = WINDOW - window_offset if ACROSS else 1
    last = following if ACROSS else tl.minimum(following, WINDOW - 1 - window_offset)
    if (tl.max(begins.to(tl.int32)) > 0) & (step <= last):
        k_at = k_part_ptr + (base * w + slot_G)[:, None] * K + d_K[None, :]
        v_at = v_part_ptr + (base * w + slot_G)[:, None] * V + d_V[None, :]
        dk = tl.load(k_at, mask=begins[:, None], other=0.0).to(tl.float32)
        dv = tl.load(v_at, mask=begins[:, None], other=0.0).to(tl.float32)
        while step <= last:
            later = (block + step).to(tl.int64) * H + h
            row_S = tl.load(slots_ptr + later * w + slot_S, mask=slot_S < w, other=-1)
            same = begins[:, None] & (row_G[:, None] == row_S[None, :])
            slot = tl.max(tl.where(same, slot_S[None, :], -1), 1)
            held = slot >= 0
            dk += tl.load(k_part_ptr + (later * w + slot)[:, None] * K + d_K[None, :], mask=held[:, None],
                          other=0.0).to(tl.float32)
            dv += tl.load(v_part_ptr + (later * w + slot)[:, None] * V + d_V[None, :], mask=held[:, None],
                          other=0.0).to(tl.float32)
            # a run has no gaps: after a block that holds none of them there is none
            step = tl.where(tl.max(held.to(tl.int32)) > 0, step + (WINDOW if ACROSS else 1), last + 1)
        tl.store(k_at, dk.to(k_part_ptr.dtype.element_ty), mask=begins[:, None])
        tl.store(v_at, dv.to(v_part_ptr.dtype.element_ty), mask=begins[:, None])


@triton.jit
def _through_norm(g, x_ptr, at, is_row, norm, mean):
    """g - x (mean norm^2 g . x): the gradient of x from the gradient g of gamma-scaled normalised rows, x from memory.

    x is read twice rather than held: together with g it would not fit the registers.
    """
    x = tl.load(x_ptr + at, mask=is_row[:, None], other=0.0).to(tl.float32)
    along = tl.sum(g * x, 1) * norm * norm * mean
    tl.debug_barrier()  # or the compiler would merge the two loads
    x = tl.load(x_ptr + at, mask=is_row[:, None], other=0.0).to(tl.float32)
    return g - x * along[:, None]


@triton.jit
def _local_sums_kernel(scratch, x, part_ptr, slots_ptr, entries_ptr, first_block_ptr, k_ptr, key_norm_ptr,
                       gamma_q_ptr, gamma_k_ptr, gate_ptr, beta_ptr, out_ptr, k_stride, H, w, tokens, blocks,
                       scratch_rows, local_column, mean, scale, D: tl.constexpr, ROWS: tl.constexpr,
                       COLUMNS: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr,
                       GATED: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, WINDOW: tl.constexpr,
                       BLOCK: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr):
    """dk (KEYS) or dv of [COLUMNS] tokens of a block and head; after the blocks, of incoming cache rows.

    ADD: to what out holds, SCALED: to beta times what it holds.

    Registers: acc [COLUMNS, D] float32. Shared memory: scratch [ROWS, COLUMNS] and x [ROWS, D] per stage.
    """
    tile = tl.program_id(0) % TILES  # the longest loops first: early tokens are seen by most queries
    h = (tl.program_id(0) // TILES) % H
    block = tl.program_id(0) // (TILES * H)
    offset_C = tile * COLUMNS + tl.arange(0, COLUMNS)
    d_D = tl.arange(0, D)
    acc = tl.zeros((COLUMNS, D), tl.float32)
    if block < blocks:
        start = block_entry(entries_ptr, block, START)
        count = block_entry(entries_ptr, block, COUNT)
        last = count
        reader = block + 1  # the first block that can hold these tokens in its cache
        readers = block_entry(entries_ptr, block, FOLLOWING)
    else:
        segment = block - blocks
        start = tokens + segment * w
        count = w
        last = 0
        reader = tl.load(first_block_ptr + segment).to(tl.int32)
        readers = tl.load(first_block_ptr + segment + 1).to(tl.int32) - reader
    if tile * COLUMNS < count:
        is_column = offset_C < count
        row_C = (start + offset_C).to(tl.int64)
        if WINDOW > 0:
            # no later query has these keys in its window
            near = tl.minimum(last, tile * COLUMNS + COLUMNS - 1 + WINDOW)
            column = local_column + BACK + tile * COLUMNS
            acc = _sum_over_queries(acc, scratch, x, (block * H + h) * scratch_rows, column, start, near,
                                    tile * COLUMNS, h * D, ROWS, PRECISION)
            if last > 0:
                acc = _sum_over_later_blocks(acc, scratch, x, entries_ptr, block, readers, h, H, scratch_rows, column,
                                             tile * COLUMNS, start, h * D, ROWS, COLUMNS, WINDOW, BLOCK, BACK,
                                             PRECISION)
        else:
            acc = _sum_over_queries(acc, scratch, x, (block * H + h) * scratch_rows, local_column + tile * COLUMNS,
                                    start, last, tile * COLUMNS, h * D, ROWS, PRECISION)
        if readers > 0:
            base = (reader.to(tl.int64) * H + h) * w
            slot_S = tl.arange(0, SLOTS)
            row_S = tl.load(slots_ptr + base + slot_S, mask=slot_S < w, other=-1)
            same = (start + offset_C)[:, None] == row_S[None, :]
            slot = tl.max(tl.where(same, slot_S[None, :], -1), 1)
            held = is_column & (slot >= 0)
            acc += tl.load(part_ptr + (base + slot)[:, None] * D + d_D[None, :], mask=held[:, None],
                           other=0.0).to(tl.float32)
        if KEYS:
            gamma = tl.load(gamma_q_ptr + d_D).to(tl.float32) * tl.load(gamma_k_ptr + d_D).to(tl.float32)
            norm = tl.load(key_norm_ptr + row_C * H + h, mask=is_column, other=0.0)
            at = (row_C * k_stride + h * D)[:, None] + d_D[None, :]
            acc = _through_norm(acc * (gamma * scale)[None, :], k_ptr, at, is_column, norm, mean)
        elif GATED:
            acc = acc * tl.sigmoid(tl.load(gate_ptr + h).to(tl.float32))
        out = out_ptr + (row_C * H + h)[:, None] * D + d_D[None, :]
        if ADD:
            more = tl.load(out, mask=is_column[:, None], other=0.0).to(tl.float32)
            if SCALED:
                more *= tl.load(beta_ptr + row_C * H + h, mask=is_column, other=0.0).to(tl.float32)[:, None]
            acc += more
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=is_column[:, None])


def launch_key_gradient(*, pairs: PairGradient, q_MHK: Tensor, k_RHK: Tensor, key_norm_RH: Tensor, dy_MHV: Tensor,
                        gamma_q: Tensor, gamma_k: Tensor, gate_H: Tensor | None, slots_UHw: Tensor, table: BlockTable,
                        mean: float, incoming: bool, dk_RHK: Tensor, dv_RHV: Tensor, add: bool, beta_MH: Tensor | None,
                        tile: Tile) -> None:
    """Fills (or adds to) dk [R, H, K] and dv [R, H, V]; with beta to beta dv instead of dv."""
    tokens, heads, key_dim = q_MHK.shape
    slots = slots_UHw.shape[2]
    launch = {"ROWS": tile.rows, "COLUMNS": tile.columns, "PRECISION": "tf32x3", **tile.launch}
    rows, columns = pairs.scratch_shape
    sides = [(tiles_of(scratch, columns, tile.rows, tile.columns), token_tiles(x, tile.rows, x.shape[2]), out, keys)
             for scratch, x, out, keys in ((pairs.dlogit, q_MHK, dk_RHK, True), (pairs.weight, dy_MHV, dv_RHV, False))]
    parts = []
    slot_tiles = cdiv(slots, tile.columns)
    for scratch, x, out, _ in sides:
        part = torch.empty(table.count, heads, slots, out.shape[2], dtype=k_RHK.dtype, device=k_RHK.device)
        if slots:
            _slot_sums_kernel[(table.count * heads * slot_tiles,)](
                scratch, x, table.entries, part, heads, slots, rows, D=out.shape[2], TILES=slot_tiles,
                INCOMING=incoming, **launch)
        parts.append(part)
    group, padded = min(8, next_power_of_2(slots)), next_power_of_2(slots)
    for across in () if not slots else (False, True) if table.max_blocks > RUN_WINDOW else (False,):
        _run_sums_kernel[(table.count * heads * cdiv(slots, group),)](
            slots_UHw, table.entries, *parts, heads, slots, table.size, tokens, K=key_dim, V=dv_RHV.shape[2],
            GROUP=group, SLOTS=padded, WINDOW=RUN_WINDOW, ACROSS=across, num_warps=4)
    local_tiles = cdiv(max(table.size, slots if incoming else 0), tile.columns)
    owners = table.count + (table.first_block.numel() - 1 if incoming else 0)
    for (scratch, x, out, keys), part in zip(sides, parts, strict=True):
        _local_sums_kernel[(owners * heads * local_tiles,)](
            scratch, x, part, slots_UHw, table.entries, table.first_block, k_RHK, key_norm_RH, gamma_q, gamma_k,
            gamma_q if gate_H is None else gate_H,
            gamma_q if beta_MH is None else beta_MH, out, k_RHK.stride(0), heads, slots, tokens, table.count, rows,
            pairs.slot_tiles * pairs.tile_columns, mean, key_dim**-0.5, D=out.shape[2], TILES=local_tiles, SLOTS=padded,
            KEYS=keys, GATED=gate_H is not None, ADD=add, SCALED=beta_MH is not None and not keys,
            **pairs.window.constants, **launch)
