"""Selection and cache attention by whole blocks, plain PyTorch: runs anywhere, differentiable.

Scores never change once written, so the best w of everything before block n + 1 are the
best w of (the best w before block n, and block n): a running set, one small sort a block.
The read then is one softmax over w cached tokens, the local part and the sink, for all
blocks at once. A sliding window reaches back into P = `window_blocks` earlier blocks, whose
tokens are concatenated before the block's own; a cached token inside the window is masked out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype, read_normalize
from hola_kernels.options import CacheOptions
from hola_kernels.segments import PaddedBlocks, cut_blocks
from hola_kernels.state import HolaState, merged_tokens


@dataclass(frozen=True)
class Selection:
    """What each block sees of its sequence's past, and what is left at the end.

    Rows number the tokens a layer can see: M tokens of this call, then N * (1 + P) * C open ones,
    then N * w cached ones (the same row means another token for each head), then one
    empty row. Empty slots point at the empty row.

    rows    [U, H, w] int64: the cache of each block, in order of position
    final   [N, H, w] int64: the cache after the call
    """

    blocks: PaddedBlocks
    rows: Tensor
    final: Tensor


def select_tokens(score_MH: Tensor, cu_seqlens: Tensor, memory: HolaState) -> Selection:
    """Running top-w over blocks; ties stay with the earlier token; no gradient."""
    blocks = cut_blocks(cu_seqlens, memory.block, memory.open_count, memory.open_k.shape[1])
    device, heads, slots = score_MH.device, score_MH.shape[1], memory.slots
    segments, block = memory.length.numel(), memory.block
    cached_row = blocks.empty + torch.arange(segments * slots, device=device).view(segments, 1, slots)
    empty_row = blocks.empty + segments * slots

    block_score = blocks.pad(score_MH, memory.open_score).transpose(1, 2)
    block_score = block_score.masked_fill(~blocks.valid[:, None], -torch.inf)
    full = blocks.valid.all(-1)
    best_score = memory.cache_score.to(block_score.dtype)
    best_row = torch.where(memory.cache_position >= 0, cached_row, empty_row)
    seen = best_row.new_full((blocks.token_index.shape[0], heads, slots), empty_row)
    merged, final = _merged_blocks(blocks, memory), best_row
    for index, rows in enumerate(blocks.blocks_by_index):
        segment = blocks.segment[rows]
        seen[rows] = best_row[segment]
        final = torch.where((merged == index)[:, None, None], best_row, final)
        closing = rows[full[rows]]
        segment = blocks.segment[closing]
        candidates = torch.cat([best_score[segment], block_score[closing]], -1)
        block_row = blocks.token_index[closing][:, None].expand(-1, heads, block)
        candidate_row = torch.cat([best_row[segment], block_row], -1)
        # empty slots last among equals of -inf; then by index, which is by position
        order = candidates.sort(dim=-1, descending=True, stable=True).indices[..., :slots].sort(-1).values
        best_score = best_score.index_copy(0, segment, candidates.gather(-1, order))
        best_row = best_row.index_copy(0, segment, candidate_row.gather(-1, order))
    # scores of -inf are empty slots, wherever the sort left them: move them after the filled ones
    final = torch.where((merged >= len(blocks.blocks_by_index))[:, None, None], best_row, final)
    return Selection(blocks, _filled_first(seen, empty_row), _filled_first(final, empty_row))


def _merged_blocks(blocks: PaddedBlocks, memory: HolaState) -> Tensor:
    """[N]: blocks of each segment whose tokens are merged into the cache when the call ends."""
    before = memory.length - memory.open_count
    after = merged_tokens(_length_after(blocks, memory), memory.block, memory.window_blocks)
    return (after - before) // memory.block


def _length_after(blocks: PaddedBlocks, memory: HolaState) -> Tensor:
    tokens = torch.zeros_like(memory.length)
    tokens.index_add_(0, blocks.segment, blocks.valid.sum(-1))
    return memory.length - memory.open_count + tokens


def _filled_first(rows: Tensor, empty_row: int) -> Tensor:
    order = (rows == empty_row).to(torch.int8).sort(dim=-1, stable=True).indices
    return rows.gather(-1, order)


def cache_attention_blocks(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, gamma_q: Tensor,
                      gamma_k: Tensor, sink_H: Tensor | None, options: CacheOptions, cu_seqlens: Tensor,
                      memory: HolaState) -> tuple[Tensor, HolaState]:
    """Flat tokens in segments -> (o_cache [M, H, V] float32 or float64, memory after the call).

    The memory's compressed state is passed through; k and v keep gradients, the choice has none.
    """
    selection = select_tokens(score_MH, cu_seqlens, memory)
    blocks = selection.blocks
    weights, v = _read_weights(q_MHK, k_MHK, v_MHV, gamma_q, gamma_k, sink_H, options, selection, memory)
    o = (weights[..., : v.shape[2]] @ v).transpose(1, 2)
    return blocks.unpad(o), memory_after(k_MHK, v_MHV, score_MH, selection, memory)


def read_mass_blocks(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, gamma_q: Tensor,
                     gamma_k: Tensor, sink_H: Tensor | None, options: CacheOptions, cu_seqlens: Tensor,
                     memory: HolaState) -> Tensor:
    """[M, H, 3]: the share of each read's softmax on cached slots, local part and sink."""
    selection = select_tokens(score_MH, cu_seqlens, memory)
    weights, v = _read_weights(q_MHK, k_MHK, v_MHV, gamma_q, gamma_k, sink_H, options, selection, memory)
    slots = memory.slots
    cached, local, sink = weights.split([slots, v.shape[2] - slots, weights.shape[-1] - v.shape[2]], -1)
    mass = torch.stack([cached.sum(-1), local.sum(-1), sink.sum(-1)], -1)
    return selection.blocks.unpad(mass.transpose(1, 2))


def cache_ages_blocks(score_MH: Tensor, cu_seqlens: Tensor, memory: HolaState) -> Tensor:
    """[A] int64: how long before the first token of its block every cached token was, over all blocks, heads, slots."""
    selection = select_tokens(score_MH, cu_seqlens, memory)
    blocks = selection.blocks
    position = _gather_heads(_score_and_position_rows(score_MH, blocks, memory)[1][..., None], selection.rows)[..., 0]
    first = (memory.length - memory.open_count)[blocks.segment] + blocks.block_index * blocks.size
    return (first[:, None, None] - position)[position >= 0]


def _read_weights(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                  sink_H: Tensor | None, options: CacheOptions, selection: Selection,
                  memory: HolaState) -> tuple[Tensor, Tensor]:
    """Softmax weights [U, H, C, w + L (+ 1)] and the values [U, H, w + L, V] they read, L = (1 + P) C."""
    compute, blocks, window = compute_dtype(v_MHV), selection.blocks, options.reach
    q = read_normalize(blocks.pad(q_MHK.to(compute)), gamma_q, options.read_norm).transpose(1, 2)
    k_rows, v_rows = _visible_rows(k_MHK, v_MHV, memory, compute)
    local, near = _local_index(blocks, k_rows.shape[0] - 1, memory.window_blocks, window)
    k = torch.cat([_gather_heads(k_rows, selection.rows), _gather_local(k_rows, local)], 2)
    v = torch.cat([_gather_heads(v_rows, selection.rows), _gather_local(v_rows, local)], 2)
    logits = (q @ read_normalize(k, gamma_k, options.read_norm).mT) * q.shape[-1] ** -0.5
    empty_row = k_rows.shape[0] - 1
    in_cache = (selection.rows != empty_row)[:, :, None].expand(-1, -1, blocks.size, -1)
    if window is not None:
        in_cache = in_cache & _before_window(q_MHK.shape[1], selection, memory, window)
    near = near[:, None].expand(*in_cache.shape[:2], -1, -1)
    logits = logits.masked_fill(~torch.cat([in_cache, near], -1), -torch.inf)
    if sink_H is not None:
        sink = sink_H.to(compute).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    return logits.softmax(-1), v


def _visible_rows(k_MHK: Tensor, v_MHV: Tensor, memory: HolaState, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """k and v of every row a `Selection` may name: [M + N C + N w + 1, H, *]."""

    def rows(tokens: Tensor, open_blocks: Tensor, cached: Tensor) -> Tensor:
        parts = [tokens, open_blocks.flatten(0, 1), cached.transpose(1, 2).flatten(0, 1)]
        return torch.cat([*(x.to(compute) for x in parts), tokens.new_zeros(1, *tokens.shape[1:], dtype=compute)])

    return rows(k_MHK, memory.open_k, memory.cache_k), rows(v_MHV, memory.open_v, memory.cache_v)


def _gather_heads(rows: Tensor, index: Tensor) -> Tensor:
    """rows [R, H, D], index [U, H, w] -> [U, H, w, D]."""
    heads = rows.shape[1]
    flat = index * heads + torch.arange(heads, device=rows.device)[:, None]
    return rows.flatten(0, 1).index_select(0, flat.flatten()).view(*index.shape, rows.shape[-1])


def _local_index(blocks: PaddedBlocks, empty_row: int, window_blocks: int, window: int | None) -> tuple[Tensor, Tensor]:
    """(index [U, L], near): rows of the block's own tokens and those of the P blocks before it, and which of them each
    of the block's tokens sees, bool [U or 1, C, L].

    Every block sees its causal half, also where it has no token: no row of a softmax is empty.
    """
    own = torch.where(blocks.valid, blocks.token_index, empty_row)
    size, device = blocks.size, own.device
    number = torch.arange(own.shape[0], device=device)
    earlier = [torch.where((blocks.block_index >= back)[:, None], own[(number - back).clamp(min=0)], empty_row)
               for back in range(window_blocks, 0, -1)]
    index = torch.cat([*earlier, own], 1)
    offset = torch.arange(index.shape[1], device=device) - window_blocks * size
    distance = torch.arange(size, device=device)[:, None] - offset
    near = (distance >= 0 if window is None else (distance >= 0) & (distance < window))[None]
    if window_blocks:
        near = near & ((index != empty_row) | (offset >= 0))[:, None]
    return index, near


def _gather_local(rows: Tensor, index: Tensor) -> Tensor:
    """rows [R, H, D], index [U, L] -> [U, H, L, D]."""
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _before_window(heads: int, selection: Selection, memory: HolaState, window: int) -> Tensor:
    """[U, H, C, w] bool: which cached tokens lie before the sliding window of each of the block's tokens."""
    blocks = selection.blocks
    position = _gather_heads(_position_rows(heads, blocks, memory)[..., None], selection.rows)[..., 0]
    first = (memory.length - memory.open_count)[blocks.segment] + blocks.block_index * blocks.size
    own = first[:, None] + torch.arange(blocks.size, device=first.device)
    return position[:, :, None] <= own[:, None, :, None] - window


def memory_after(k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, selection: Selection,
                  memory: HolaState) -> HolaState:
    blocks = selection.blocks
    k_rows, v_rows = _visible_rows(k_MHK, v_MHV, memory, memory.open_k.dtype)
    score_rows, position_rows = _score_and_position_rows(score_MH, blocks, memory)

    def cached(rows: Tensor) -> Tensor:
        return _gather_heads(rows, selection.final)

    length, merged = _length_after(blocks, memory), _merged_blocks(blocks, memory)
    # the blocks after the merged ones are the open blocks; without a window there is one at most, which is not full
    open_index = torch.full((length.numel(), 1 + memory.window_blocks, blocks.size), k_rows.shape[0] - 1,
                            device=k_rows.device)
    offset = blocks.block_index - merged[blocks.segment]
    stays = offset >= 0
    open_index[blocks.segment[stays], offset[stays]] = torch.where(
        blocks.valid[stays], blocks.token_index[stays], k_rows.shape[0] - 1)
    open_index = open_index.flatten(1)
    return HolaState(memory.state, cached(k_rows), cached(v_rows),
                     cached(score_rows[..., None])[..., 0], cached(position_rows[..., None])[..., 0],
                     k_rows[open_index], v_rows[open_index],
                     score_rows[open_index].masked_fill(open_index[..., None] == k_rows.shape[0] - 1, 0.0), length,
                     memory.window_blocks)


def _score_and_position_rows(score_MH: Tensor, blocks: PaddedBlocks, memory: HolaState) -> tuple[Tensor, Tensor]:
    """Score and position of every row, [R, H]; -inf and -1 in the empty one."""
    heads, compute = score_MH.shape[1], memory.cache_score.dtype
    cached = memory.cache_score.transpose(1, 2).flatten(0, 1)
    scores = torch.cat([score_MH.to(compute), memory.open_score.flatten(0, 1).to(compute), cached,
                        cached.new_full((1, heads), -torch.inf)])
    return scores, _position_rows(heads, blocks, memory)


def _position_rows(heads: int, blocks: PaddedBlocks, memory: HolaState) -> Tensor:
    """Position in its sequence of every row [R, H] int64; -1 in the empty one."""
    cached = memory.cache_position.transpose(1, 2).flatten(0, 1)
    first = memory.length - memory.open_count
    within = blocks.block_index[:, None] * blocks.size + torch.arange(blocks.size, device=first.device)
    position = torch.full((blocks.empty + 1,), -1, dtype=torch.int64, device=first.device)
    position[blocks.token_index[blocks.valid]] = (first[blocks.segment, None] + within)[blocks.valid]
    return torch.cat([position[:-1, None].expand(-1, heads), cached, cached.new_full((1, heads), -1)])
