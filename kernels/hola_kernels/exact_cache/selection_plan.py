"""Which candidates every block's cache is chosen from, so that all blocks choose at the same time.

Scores never change once written, so the cache of a block is the top w of everything before
it, and a top w is the top w of the top w's of its parts. CacheBlocks are grouped into spans of
about 2,000 tokens. Within its first span a block looks at the raw scores; later ones look
at the w best before their span, and at the raw scores of their span:

    span     the w best of each span                              (all spans in parallel)
    prefix   the w best of all spans before each span             (all spans in parallel)
    block    the w best of prefix and the span's earlier blocks   (all blocks in parallel)

Sequences of one span (the usual pretraining length) need the last step only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.memo import by_shape, memoise
from hola_kernels.options import CacheOptions
from hola_kernels.segments import dense_cu_seqlens

CANDIDATES = 2048  # of one tile of the selection kernel


@dataclass(frozen=True)
class SelectionPlan:
    """Jobs [J, 4] int32: lists [from, to) and then raw tokens [from, to), both in order of position.

    span_jobs, prefix_jobs   [spans, 4] or None when every sequence fits one span
    block_jobs               [U, 4]: the cache of each block
    final_jobs               [N, 4]: the cache after the call
    span_list                [spans] int64: index of each span's list among the lists (after its segment's
                             incoming list, where there are incoming ones)
    incoming_list            [N] int64: index of each segment's incoming list
    max_lists                that a job of prefix_jobs can join, from shapes alone

    span_jobs and prefix_jobs write a list a span; block_jobs and final_jobs read those of prefix_jobs, or the incoming
    lists where that is None.
    """

    span_jobs: Tensor | None
    prefix_jobs: Tensor | None
    block_jobs: Tensor
    final_jobs: Tensor
    span_list: Tensor
    incoming_list: Tensor
    max_lists: int


def selection_plan(cu_seqlens: Tensor, tokens: int, options: CacheOptions, blocks: int, *, equal_length: bool,
                   incoming: bool) -> SelectionPlan:
    """The plan of M tokens cut at cu_seqlens [N + 1], int64 on the device.

    blocks: rows of the block table. equal_length: all segments have M / N tokens. incoming: segments carry a cache.
    """
    shape = (options.block, options.slots, options.window_blocks)
    if equal_length:
        return _equal_length_plan(cu_seqlens.numel() - 1, tokens, shape, blocks, incoming, cu_seqlens.device)
    return memoise(cu_seqlens, ("plan", tokens, shape, blocks, incoming),
                   lambda: _build(cu_seqlens, tokens, tokens, shape, blocks, incoming))


@by_shape
def _equal_length_plan(segments: int, tokens: int, shape: tuple[int, int, int], blocks: int, incoming: bool,
                       device: torch.device) -> SelectionPlan:
    length = tokens // max(segments, 1)
    return _build(dense_cu_seqlens(segments, length, device), tokens, length, shape, blocks, incoming)


def _build(cu_seqlens: Tensor, tokens: int, max_seqlen: int, shape: tuple[int, int, int], blocks: int,
           incoming: bool) -> SelectionPlan:
    """shape: tokens of a block, slots, blocks that a window reaches back into. max_seqlen: no segment is longer, known
    without a look at the device."""
    size, slots, window_blocks = shape
    per_span = max(1, (CANDIDATES - slots) // size + 1)
    several = max_seqlen > per_span * size
    segments = cu_seqlens.numel() - 1
    length = cu_seqlens.diff()
    count = (length + size - 1) // size
    spans = ((count + per_span - 1) // per_span).clamp(min=1)
    first_block = torch.cat([count.new_zeros(1), count.cumsum(0)])
    first_span = torch.cat([spans.new_zeros(1), spans.cumsum(0)])
    segment_index = torch.arange(segments, device=cu_seqlens.device)
    lists_before = segment_index + 1 if incoming else torch.zeros_like(segment_index)
    incoming_list = first_span[:-1] + segment_index if several else segment_index

    def span_start(segment: Tensor, span: Tensor) -> Tensor:
        return cu_seqlens[segment] + span * per_span * size

    def read(segment: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
        """The lists that hold what came before span number `span` of the segment."""
        if several:
            at = first_span[segment] + span
            return at, at + 1
        at = segment if incoming else torch.zeros_like(segment)
        return at, at + int(incoming)

    block = torch.arange(blocks, device=cu_seqlens.device)
    segment = _segment_of(first_block, block)
    index = block - first_block[segment]
    start = span_start(segment, index // per_span)
    block_jobs = _jobs(*read(segment, index // per_span), start, cu_seqlens[segment] + index * size)
    block_jobs = torch.where((block < first_block[-1])[:, None], block_jobs, 0)

    closed = (length // size - window_blocks).clamp(min=0)
    last = ((closed + per_span - 1) // per_span - 1).clamp(min=0)
    final_jobs = _jobs(*read(segment_index, last), span_start(segment_index, last), cu_seqlens[:-1] + closed * size)

    span = torch.arange(tokens // (per_span * size) + segments, device=cu_seqlens.device)
    segment = _segment_of(first_span, span)
    index = span - first_span[segment]
    span_list = span + lists_before[segment]
    span_jobs = prefix_jobs = None
    if several:
        real = (span < first_span[-1])[:, None]
        start = span_start(segment, index)
        end = torch.minimum(start + per_span * size, cu_seqlens[segment + 1])
        nothing = torch.zeros_like(span)
        span_jobs = torch.where(real, _jobs(nothing, nothing, start, end), 0)
        from_list = first_span[segment] + (segment if incoming else 0)
        prefix_jobs = torch.where(real, _jobs(from_list, span_list, nothing, nothing), 0)
    max_lists = (max_seqlen - 1) // (per_span * size) + int(incoming)  # of all spans but the last
    return SelectionPlan(span_jobs, prefix_jobs, block_jobs, final_jobs, span_list, incoming_list, max_lists)


def _segment_of(first: Tensor, index: Tensor) -> Tensor:
    return (torch.searchsorted(first, index, right=True) - 1).clamp(0, max(first.numel() - 2, 0))


def _jobs(*columns: Tensor) -> Tensor:
    return torch.stack(columns, 1).to(torch.int32)
