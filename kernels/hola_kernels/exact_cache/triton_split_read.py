"""Cache attention, forward, in two passes: what needs no slots first, so that it can run while the slots are found.

    local    sink and local block: o (float32), lse, and what follows from q alone; in runs of blocks, one launch each
    cached   the cached slots, and y

The first pass's result is to the second a single key, with logit lse and value o: a softmax goes on from there as it
does from the sink. o crosses in float32: rounded to bfloat16 on the way, o_cache would be 1.5e-3 off, as much again as
its own rounding is.

A block may have tokens whose keys come late (over ranks: those carried from the left neighbour). They are its first
ones; the local pass leaves them out, and the cached pass takes them after the slots.

Over the one pass of `triton_forward` this writes and reads o (float32) once more, and reads q: at 65,536 tokens,
4 heads, K = V = 256 in 16 bits 0.27 + 0.27 + 0.13 GB, 0.16 ms at 4.3 TB/s, of which the local pass has 0.06.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.block_table import BlockTable
from hola_kernels.exact_cache.read_configs import Tile
from hola_kernels.exact_cache.triton_forward import EPS, LOG2E, softmax_start
from hola_kernels.integers import cdiv
from hola_kernels.triton_block_table import COUNT, INDEX, SEGMENT, START, block_entry

ALIGNED = 4  # blocks: their rows of the table begin at a multiple of 16 bytes, which Triton compiles for
VALUE_WIDTH = 128  # columns of V of a program of the cached pass: with all 256, local o and o at once spill


@triton.jit
def _add_keys(q, q_norm, k, v, key_norm, visible, highest, total, o, PRECISION: tl.constexpr):
    """(highest, total, o) of an online softmax after the tiles k, v [COLUMNS, ...], in which nothing may be visible."""
    logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * q_norm[:, None] * key_norm[None, :]
    logit = tl.where(visible, logit, float("-inf"))
    new_highest = tl.maximum(tl.maximum(highest, tl.max(logit, 1)), -1e30)
    weight = tl.exp2(logit - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    o = tl.dot(weight.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
    return new_highest, total * shrink + tl.sum(weight, 1), o


@triton.jit
def _carried_tokens(entries_ptr, block, index, carried_tokens, carried_segments):
    """How many of the block's first tokens are carried."""
    return tl.where((index == 0) & (block_entry(entries_ptr, block, SEGMENT) < carried_segments), carried_tokens, 0)


@triton.jit(do_not_specialize=["carried_tokens", "carried_segments"])  # they differ from batch to batch
def _local_read_kernel(q_ptr, k_ptr, v_ptr, key_norm_ptr, gamma_q_ptr, gamma_k_ptr, sink_ptr, entries_ptr,
                     o_ptr, lse_ptr, query_norm_ptr, scaled_ptr, q_stride, k_stride, v_stride, H, mean, scale,
                     carried_tokens, carried_segments,
                     K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                     ROW_TILES: tl.constexpr, SINK: tl.constexpr, STAGED: tl.constexpr, PRECISION: tl.constexpr):
    """o [M, H, V] float32, lse [M, H] (-inf where a row sees nothing yet), query_norm [M, H], scaled queries [M, H, K].

    Shared memory: q' [ROWS, K] once, k and v tiles [COLUMNS, K or V] per stage.
    Registers: o [ROWS, V] float32, logits [ROWS, COLUMNS] float32, row maxima and sums.
    """
    tile = ROW_TILES - 1 - tl.program_id(0) % ROW_TILES  # the longest loops first
    h = (tl.program_id(0) // ROW_TILES) % H
    block = tl.program_id(0) // (ROW_TILES * H)
    start = block_entry(entries_ptr, block, START)
    count = block_entry(entries_ptr, block, COUNT)
    index = block_entry(entries_ptr, block, INDEX)
    carried = _carried_tokens(entries_ptr, block, index, carried_tokens, carried_segments)
    if tile * ROWS < count:
        offset_R = tile * ROWS + tl.arange(0, ROWS)
        is_row = offset_R < count
        row_R = (start + offset_R).to(tl.int64)
        at_H = row_R * H + h
        d_K, d_V, c_C = tl.arange(0, K), tl.arange(0, V), tl.arange(0, COLUMNS)

        gamma = tl.load(gamma_q_ptr + d_K).to(tl.float32) * tl.load(gamma_k_ptr + d_K).to(tl.float32)
        q = tl.load(q_ptr + (row_R * q_stride + h * K)[:, None] + d_K[None, :], mask=is_row[:, None], other=0.0)
        q = q.to(tl.float32)
        q_norm = tl.rsqrt(tl.sum(q * q, 1) * mean + EPS)
        tl.store(query_norm_ptr + at_H, q_norm, mask=is_row)
        q = (q * gamma[None, :]).to(k_ptr.dtype.element_ty)
        scaled_at = scaled_ptr + at_H[:, None] * K + d_K[None, :]
        tl.store(scaled_at, q, mask=is_row[:, None])
        if STAGED:  # a tile that was computed stays in registers as an operand, one that was loaded does not
            tl.debug_barrier()
            q = tl.load(scaled_at, mask=is_row[:, None], other=0.0)

        q_norm = q_norm * (scale * LOG2E)
        highest, total = softmax_start(sink_ptr, h, ROWS, SINK)
        o = tl.zeros((ROWS, V), tl.float32)
        for t in tl.range(carried // COLUMNS, tl.cdiv(tl.minimum(count, (tile + 1) * ROWS), COLUMNS)):
            offset_C = t * COLUMNS + c_C
            seen = (offset_C >= carried) & (offset_C < count)
            row_C = (start + offset_C).to(tl.int64)
            k = tl.load(k_ptr + row_C[:, None] * k_stride + h * K + d_K[None, :], mask=seen[:, None], other=0.0)
            v = tl.load(v_ptr + row_C[:, None] * v_stride + h * V + d_V[None, :], mask=seen[:, None], other=0.0)
            key_norm = tl.load(key_norm_ptr + row_C * H + h, mask=seen, other=0.0)
            visible = seen[None, :] & (offset_C[None, :] <= offset_R[:, None])
            highest, total, o = _add_keys(q, q_norm, k, v, key_norm, visible, highest, total, o, PRECISION)

        o = o * (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
        tl.store(lse_ptr + at_H, highest + tl.log2(total), mask=is_row)
        tl.store(o_ptr + at_H[:, None] * V + d_V[None, :], o, mask=is_row[:, None])


@triton.jit(do_not_specialize=["carried_tokens", "carried_segments"])
def _cached_read_kernel(scaled_ptr, k_ptr, v_ptr, query_norm_ptr, key_norm_ptr, gate_ptr, o_state_ptr, slots_ptr,
                      entries_ptr, local_ptr, local_lse_ptr, y_ptr, o_cache_ptr, lse_ptr,
                      k_stride, v_stride, o_state_stride, H, w, scale, carried_tokens, carried_segments,
                      K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                      COLUMNS: tl.constexpr, SLOT_TILES: tl.constexpr, ROW_TILES: tl.constexpr, INCOMING: tl.constexpr,
                      PRECISION: tl.constexpr):
    """y, o_cache [M, H, V], lse [M, H] as `_read_forward_kernel` writes them. A program owns WIDTH columns of V.

    Shared memory: q' [ROWS, K] once, k and v tiles [COLUMNS, K or WIDTH] per stage.
    Registers: o and local o [ROWS, WIDTH] float32, logits [ROWS, COLUMNS] float32, row maxima and sums.
    """
    PARTS: tl.constexpr = V // WIDTH
    part = tl.program_id(0) % PARTS
    tile = (tl.program_id(0) // PARTS) % ROW_TILES
    h = (tl.program_id(0) // (PARTS * ROW_TILES)) % H
    block = tl.program_id(0) // (PARTS * ROW_TILES * H)
    start = block_entry(entries_ptr, block, START)
    count = block_entry(entries_ptr, block, COUNT)
    index = block_entry(entries_ptr, block, INDEX)
    carried = _carried_tokens(entries_ptr, block, index, carried_tokens, carried_segments)
    if tile * ROWS < count:
        offset_R = tile * ROWS + tl.arange(0, ROWS)
        is_row = offset_R < count
        row_R = (start + offset_R).to(tl.int64)
        at_H = row_R * H + h
        d_K, d_V, c_C = tl.arange(0, K), part * WIDTH + tl.arange(0, WIDTH), tl.arange(0, COLUMNS)

        slots_at = slots_ptr + (block.to(tl.int64) * H + h) * w
        q = tl.load(scaled_ptr + at_H[:, None] * K + d_K[None, :], mask=is_row[:, None], other=0.0)
        q_norm = tl.load(query_norm_ptr + at_H, mask=is_row, other=0.0) * (scale * LOG2E)
        local_lse = tl.load(local_lse_ptr + at_H, mask=is_row, other=0.0)
        highest, total = local_lse, tl.zeros((ROWS,), tl.float32) + 1.0
        o = tl.zeros((ROWS, WIDTH), tl.float32)
        first = 0 if INCOMING else tl.where(index > 0, 0, SLOT_TILES)  # the first block has no past
        for t in tl.range(first, SLOT_TILES + tl.cdiv(tl.minimum(carried, (tile + 1) * ROWS), COLUMNS)):
            cached = t < SLOT_TILES
            offset_C = (t - SLOT_TILES) * COLUMNS + c_C
            slot_row = tl.load(slots_at + t * COLUMNS + c_C, mask=cached & (t * COLUMNS + c_C < w), other=-1)
            seen = tl.where(cached, slot_row >= 0, offset_C < carried)
            row_C = tl.where(cached, slot_row, start + offset_C).to(tl.int64)
            k = tl.load(k_ptr + row_C[:, None] * k_stride + h * K + d_K[None, :], mask=seen[:, None], other=0.0)
            v = tl.load(v_ptr + row_C[:, None] * v_stride + h * V + d_V[None, :], mask=seen[:, None], other=0.0)
            key_norm = tl.load(key_norm_ptr + row_C * H + h, mask=seen, other=0.0)
            visible = seen[None, :] & (cached | (offset_C[None, :] <= offset_R[:, None]))
            highest, total, o = _add_keys(q, q_norm, k, v, key_norm, visible, highest, total, o, PRECISION)

        # the local o joins here and not as the loop's start: it comes in the layout in which results leave
        at = at_H[:, None] * V + d_V[None, :]
        local = tl.load(local_ptr + at, mask=is_row[:, None], other=0.0)
        o = (o + local * tl.exp2(local_lse - highest)[:, None]) * (1.0 / total)[:, None]
        tl.store(lse_ptr + at_H, highest + tl.log2(total), mask=is_row & (part == 0))
        tl.store(o_cache_ptr + at, o.to(o_cache_ptr.dtype.element_ty), mask=is_row[:, None])
        share = tl.sigmoid(tl.load(gate_ptr + h).to(tl.float32))
        o_state = tl.load(o_state_ptr + row_R[:, None] * o_state_stride + h * V + d_V[None, :], mask=is_row[:, None],
                          other=0.0).to(tl.float32)
        tl.store(y_ptr + at, (o_state + share * o).to(y_ptr.dtype.element_ty), mask=is_row[:, None])


@dataclass(frozen=True)
class SplitRead:
    """A read in two passes: what it takes, and what the first pass leaves for the second.

    q_MHK, k_RHK, v_RHV, key_norm_RH, gamma_q, gamma_k, sink_H, table, mean, tile   as `launch_read_forward` has them;
                                  rows of k, v and key_norm that the local pass does not see may still be written
    carried_tokens, carried_segments   how many first tokens of the first segments come late
    o_MHV, lse_MH                 float32: of the local pass
    query_norm_MH, scaled_MHK     of all queries: inverse norms, and gamma_q gamma_k q
    """

    q_MHK: Tensor
    k_RHK: Tensor
    v_RHV: Tensor
    key_norm_RH: Tensor
    gamma_q: Tensor
    gamma_k: Tensor
    sink_H: Tensor | None
    table: BlockTable
    mean: float
    tile: Tile
    carried_tokens: int
    carried_segments: int
    o_MHV: Tensor
    lse_MH: Tensor
    query_norm_MH: Tensor
    scaled_MHK: Tensor

    def runs(self, shares: tuple[int, ...]) -> list[tuple[int, int]]:
        """All blocks in runs [from, to) for `launch_local_read`, about in these shares."""
        ends = [sum(shares[: n + 1]) * self.table.count // sum(shares) // ALIGNED * ALIGNED for n in range(len(shares))]
        ends[-1] = self.table.count
        return list(zip([0, *ends[:-1]], ends, strict=True))


def allocate_split_read(*, q_MHK: Tensor, k_RHK: Tensor, v_RHV: Tensor, key_norm_RH: Tensor, gamma_q: Tensor,
                        gamma_k: Tensor, sink_H: Tensor | None, table: BlockTable, mean: float, tile: Tile,
                        carried_tokens: int = 0, carried_segments: int = 0) -> SplitRead:
    """The read with its result buffers allocated; nothing is launched."""
    tokens, heads, value_dim = *q_MHK.shape[:2], v_RHV.shape[2]
    device = q_MHK.device
    lse_MH = torch.empty(tokens, heads, dtype=torch.float32, device=device)
    return SplitRead(
        q_MHK, k_RHK, v_RHV, key_norm_RH, gamma_q, gamma_k, sink_H, table, mean, tile, carried_tokens, carried_segments,
        o_MHV=torch.empty(tokens, heads, value_dim, dtype=torch.float32, device=device), lse_MH=lse_MH,
        query_norm_MH=torch.empty_like(lse_MH),
        scaled_MHK=torch.empty(q_MHK.shape, dtype=k_RHK.dtype, device=device))


def launch_local_read(read: SplitRead, run: tuple[int, int]) -> None:
    """The local pass over the blocks [from, to); every block once, in any order."""
    heads, key_dim, tile, (first, last) = *read.q_MHK.shape[1:], read.tile, run
    row_tiles = cdiv(read.table.size, tile.rows)
    if first == last:
        return
    _local_read_kernel[((last - first) * heads * row_tiles,)](
        read.q_MHK, read.k_RHK, read.v_RHV, read.key_norm_RH, read.gamma_q, read.gamma_k,
        read.lse_MH if read.sink_H is None else read.sink_H, read.table.entries[first:last], read.o_MHV, read.lse_MH,
        read.query_norm_MH, read.scaled_MHK, read.q_MHK.stride(0), read.k_RHK.stride(0), read.v_RHV.stride(0), heads,
        read.mean, key_dim**-0.5, read.carried_tokens, read.carried_segments, K=key_dim, V=read.v_RHV.shape[2],
        ROWS=tile.rows, COLUMNS=tile.columns, ROW_TILES=row_tiles, SINK=read.sink_H is not None, STAGED=tile.staged,
        PRECISION="tf32x3", **tile.launch)


def launch_cached_read(read: SplitRead, *, gate_H: Tensor, o_state_MHV: Tensor, slots_UHw: Tensor,
                     incoming: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `launch_read_forward` returns, once all blocks have been through the local pass."""
    tokens, heads, key_dim = read.q_MHK.shape
    value_dim, slots, tile = read.v_RHV.shape[2], slots_UHw.shape[2], read.tile
    o_cache = torch.empty(tokens, heads, value_dim, dtype=read.v_RHV.dtype, device=read.q_MHK.device)
    y, lse_MH = torch.empty_like(o_cache), torch.empty_like(read.lse_MH)
    row_tiles, width = cdiv(read.table.size, tile.rows), min(value_dim, VALUE_WIDTH)
    _cached_read_kernel[(read.table.count * heads * row_tiles * (value_dim // width),)](
        read.scaled_MHK, read.k_RHK, read.v_RHV, read.query_norm_MH, read.key_norm_RH, gate_H, o_state_MHV, slots_UHw,
        read.table.entries, read.o_MHV, read.lse_MH, y, o_cache, lse_MH, read.k_RHK.stride(0), read.v_RHV.stride(0),
        o_state_MHV.stride(0), heads, slots, key_dim**-0.5, read.carried_tokens, read.carried_segments, K=key_dim,
        V=value_dim, WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns, SLOT_TILES=cdiv(slots, tile.columns),
        ROW_TILES=row_tiles, INCOMING=incoming, PRECISION="tf32x3", **tile.launch)
    return y, o_cache, lse_MH, read.query_norm_MH
