"""Selection and exact read by whole blocks, plain PyTorch: runs anywhere, differentiable.

Scores never change once written, so the best w of everything before block n + 1 are the
best w of (the best w before block n, and block n): a running set, one small sort a block.
The read then is one softmax over w cached places, the causal block and the sink, for all
blocks at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype, read_normalize
from hola_kernels.segments import Units, cut_units
from hola_kernels.state import HolaState


@dataclass(frozen=True)
class Selection:
    """What each block sees of its sequence's past, and what is left at the end.

    Rows number the tokens a layer can see: M tokens of this call, then N * C open ones,
    then N * w cached ones (the same row means another token for each head), then one
    empty row. Empty slots point at the empty row.

    rows    [U, H, w] int64: the cache of each block, in order of position
    final   [N, H, w] int64: the cache after the call
    """

    units: Units
    rows: Tensor
    final: Tensor


def select_tokens(score_MH: Tensor, cu_seqlens: Tensor, memory: HolaState) -> Selection:
    """Running top-w over blocks; ties stay with the earlier token; no gradient."""
    units = cut_units(cu_seqlens, memory.block, memory.open_count)
    device, heads, slots = score_MH.device, score_MH.shape[1], memory.slots
    segments, block = memory.length.numel(), memory.block
    cached_row = units.empty + torch.arange(segments * slots, device=device).view(segments, 1, slots)
    empty_row = units.empty + segments * slots

    block_score = units.pad(score_MH, memory.open_score).transpose(1, 2)
    block_score = block_score.masked_fill(~units.valid[:, None], -torch.inf)
    full = units.valid.all(-1)
    best_score = memory.cache_score.to(block_score.dtype)
    best_row = torch.where(memory.cache_position >= 0, cached_row, empty_row)
    seen = best_row.new_full((units.index.shape[0], heads, slots), empty_row)
    for rows in units.rows:
        segment = units.segment[rows]
        seen[rows] = best_row[segment]
        closing = rows[full[rows]]
        segment = units.segment[closing]
        candidates = torch.cat([best_score[segment], block_score[closing]], -1)
        block_row = units.index[closing][:, None].expand(-1, heads, block)
        candidate_row = torch.cat([best_row[segment], block_row], -1)
        # empty slots last among equals of -inf; then by place, which is by position
        order = candidates.sort(dim=-1, descending=True, stable=True).indices[..., :slots].sort(-1).values
        best_score = best_score.index_copy(0, segment, candidates.gather(-1, order))
        best_row = best_row.index_copy(0, segment, candidate_row.gather(-1, order))
    # scores of -inf are empty slots, wherever the sort left them: move them behind the filled ones
    return Selection(units, _filled_first(seen, empty_row), _filled_first(best_row, empty_row))


def _filled_first(rows: Tensor, empty_row: int) -> Tensor:
    order = (rows == empty_row).to(torch.int8).sort(dim=-1, stable=True).indices
    return rows.gather(-1, order)


def exact_read_blocks(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, gamma_q: Tensor,
                      gamma_k: Tensor, sink_H: Tensor | None, read_norm: str, cu_seqlens: Tensor,
                      memory: HolaState) -> tuple[Tensor, HolaState]:
    """Flat tokens in segments -> (o_cache [M, H, V] float32 or float64, memory after the call).

    The memory's compressed state is passed through; k and v keep gradients, the choice has none.
    """
    selection = select_tokens(score_MH, cu_seqlens, memory)
    units = selection.units
    weights, v = _read_weights(q_MHK, k_MHK, v_MHV, gamma_q, gamma_k, sink_H, read_norm, selection, memory)
    o = (weights[..., : v.shape[2]] @ v).transpose(1, 2)
    return units.unpad(o), _memory_after(k_MHK, v_MHV, score_MH, selection, memory)


def read_mass_blocks(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, gamma_q: Tensor,
                     gamma_k: Tensor, sink_H: Tensor | None, read_norm: str, cu_seqlens: Tensor,
                     memory: HolaState) -> Tensor:
    """[M, H, 3]: the share of each read's softmax on cached slots, own block and sink."""
    selection = select_tokens(score_MH, cu_seqlens, memory)
    weights, v = _read_weights(q_MHK, k_MHK, v_MHV, gamma_q, gamma_k, sink_H, read_norm, selection, memory)
    cached, block, sink = weights.split([memory.slots, memory.block, weights.shape[-1] - v.shape[2]], -1)
    mass = torch.stack([cached.sum(-1), block.sum(-1), sink.sum(-1)], -1)
    return selection.units.unpad(mass.transpose(1, 2))


def cache_ages_blocks(score_MH: Tensor, cu_seqlens: Tensor, memory: HolaState) -> Tensor:
    """[A] int64: how long before the first token of its block every cached token was, over all blocks, heads, slots."""
    selection = select_tokens(score_MH, cu_seqlens, memory)
    units = selection.units
    position = _gather_heads(_score_and_position_rows(score_MH, units, memory)[1][..., None], selection.rows)[..., 0]
    first = (memory.length - memory.open_count)[units.segment] + units.ordinal * units.size
    return (first[:, None, None] - position)[position >= 0]


def _read_weights(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                  sink_H: Tensor | None, read_norm: str, selection: Selection,
                  memory: HolaState) -> tuple[Tensor, Tensor]:
    """Softmax weights [U, H, C, w + C (+ 1)] and the values [U, H, w + C, V] they read."""
    wide, units = compute_dtype(v_MHV), selection.units
    q = read_normalize(units.pad(q_MHK.to(wide)), gamma_q, read_norm).transpose(1, 2)
    k_rows, v_rows = _visible_rows(k_MHK, v_MHV, memory, wide)
    k = torch.cat([_gather_heads(k_rows, selection.rows), _block(k_rows, units)], 2)
    v = torch.cat([_gather_heads(v_rows, selection.rows), _block(v_rows, units)], 2)
    logits = (q @ read_normalize(k, gamma_k, read_norm).mT) * q.shape[-1] ** -0.5
    empty_row = k_rows.shape[0] - 1
    causal = torch.ones(units.size, units.size, dtype=torch.bool, device=q.device).tril()
    in_cache = (selection.rows != empty_row)[:, :, None].expand(-1, -1, units.size, -1)
    in_block = causal.expand(*in_cache.shape[:2], -1, -1)
    logits = logits.masked_fill(~torch.cat([in_cache, in_block], -1), -torch.inf)
    if sink_H is not None:
        sink = sink_H.to(wide).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    return logits.softmax(-1), v


def _visible_rows(k_MHK: Tensor, v_MHV: Tensor, memory: HolaState, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """k and v of every row a `Selection` may name: [M + N C + N w + 1, H, *]."""

    def rows(tokens: Tensor, opened: Tensor, cached: Tensor) -> Tensor:
        parts = [tokens, opened.flatten(0, 1), cached.transpose(1, 2).flatten(0, 1)]
        return torch.cat([*(x.to(wide) for x in parts), tokens.new_zeros(1, *tokens.shape[1:], dtype=wide)])

    return rows(k_MHK, memory.open_k, memory.cache_k), rows(v_MHV, memory.open_v, memory.cache_v)


def _gather_heads(rows: Tensor, index: Tensor) -> Tensor:
    """rows [R, H, D], index [U, H, w] -> [U, H, w, D]."""
    heads = rows.shape[1]
    flat = index * heads + torch.arange(heads, device=rows.device)[:, None]
    return rows.flatten(0, 1).index_select(0, flat.flatten()).view(*index.shape, rows.shape[-1])


def _block(rows: Tensor, units: Units) -> Tensor:
    """rows [R, H, D] -> the blocks' own tokens [U, H, C, D]."""
    index = torch.where(units.valid, units.index, rows.shape[0] - 1)
    return rows.index_select(0, index.flatten()).unflatten(0, (-1, units.size)).transpose(1, 2)


def _memory_after(k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, selection: Selection,
                  memory: HolaState) -> HolaState:
    units = selection.units
    k_rows, v_rows = _visible_rows(k_MHK, v_MHV, memory, memory.open_k.dtype)
    score_rows, position_rows = _score_and_position_rows(score_MH, units, memory)

    def cached(rows: Tensor) -> Tensor:
        return _gather_heads(rows, selection.final)

    segments = memory.length.numel()
    tokens = torch.zeros_like(memory.length)
    tokens.index_add_(0, units.segment, units.valid.sum(-1))
    length = memory.length - memory.open_count + tokens
    # the last unit of a segment is its open block, unless it is full or the segment has none
    open_index = torch.full((segments, units.size), k_rows.shape[0] - 1, device=k_rows.device)
    partial = ~units.valid.all(-1)
    open_index[units.segment[partial]] = torch.where(
        units.valid[partial], units.index[partial], k_rows.shape[0] - 1)
    return HolaState(memory.state, cached(k_rows), cached(v_rows),
                     cached(score_rows[..., None])[..., 0], cached(position_rows[..., None])[..., 0],
                     k_rows[open_index], v_rows[open_index],
                     score_rows[open_index].masked_fill(open_index[..., None] == k_rows.shape[0] - 1, 0.0), length)


def _score_and_position_rows(score_MH: Tensor, units: Units, memory: HolaState) -> tuple[Tensor, Tensor]:
    """Score and position of every row, [R, H]; -inf and -1 in the empty one."""
    heads, wide = score_MH.shape[1], memory.cache_score.dtype
    cached = [x.transpose(1, 2).flatten(0, 1) for x in (memory.cache_score, memory.cache_position)]
    scores = torch.cat([score_MH.to(wide), memory.open_score.flatten(0, 1).to(wide), cached[0],
                        cached[0].new_full((1, heads), -torch.inf)])
    first = memory.length - memory.open_count
    within = units.ordinal[:, None] * units.size + torch.arange(units.size, device=score_MH.device)
    position = torch.full((units.empty + 1,), -1, dtype=torch.int64, device=score_MH.device)
    position[units.index[units.valid]] = (first[units.segment, None] + within)[units.valid]
    positions = torch.cat([position[:-1, None].expand(-1, heads), cached[1],
                           cached[1].new_full((1, heads), -1)])
    return scores, positions
