"""Which candidates every block's cache is chosen from, so that all blocks choose at the same time.

Scores never change once written, so the cache of a block is the top w of everything before
it, and a top w is the top w of the top w's of its parts. Blocks are grouped into spans of
about 2,000 tokens. Within its first span a block looks at the raw scores; later ones look
at the w best before their span, and at the raw scores of their span:

    own      the w best of each span                              (all spans in parallel)
    prefix   the w best of all spans before each span             (all spans in parallel)
    unit     the w best of prefix and the span's earlier blocks   (all blocks in parallel)

Sequences of one span (the usual pretraining length) need the last step only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.memo import by_shape, remember
from hola_kernels.segments import dense_cu_seqlens

CANDIDATES = 2048  # places of one tile of the selection kernel


@dataclass(frozen=True)
class SelectionPlan:
    """Jobs [J, 4] int32: lists [from, to) and then raw tokens [from, to), both in order of position.

    own, prefix   [spans, 4] or None when every sequence fits one span
    unit          [U, 4]; final [N, 4]: the cache after the call
    own_list      [spans] int64: where the list of each span lies among the lists (after its
                  segment's incoming list, where there are incoming ones)
    incoming_list [N] int64: where the incoming list of each segment lies
    lists         that a job of prefix can join, from shapes alone

    own and prefix write a list a span; `unit` and `final` read prefix, or the incoming lists where
    prefix is None.
    """

    own: Tensor | None
    prefix: Tensor | None
    unit: Tensor
    final: Tensor
    own_list: Tensor
    incoming_list: Tensor
    lists: int


def selection_plan(cuts: Tensor, tokens: int, block: int, slots: int, units: int, *, dense: bool,
                   incoming: bool) -> SelectionPlan:
    """cuts [N + 1] int64 on the device; units: rows of the unit table; incoming: segments bring a cache."""
    if dense:
        return _dense_plan(cuts.numel() - 1, tokens, block, slots, units, incoming, cuts.device)
    return remember(cuts, ("plan", tokens, block, slots, units, incoming),
                    lambda: _build(cuts, tokens, tokens, block, slots, units, incoming))


@by_shape
def _dense_plan(segments: int, tokens: int, block: int, slots: int, units: int, incoming: bool,
                device: torch.device) -> SelectionPlan:
    length = tokens // max(segments, 1)
    return _build(dense_cu_seqlens(segments, length, device), tokens, length, block, slots, units, incoming)


def _build(cuts: Tensor, tokens: int, longest: int, block: int, slots: int, units: int,
           incoming: bool) -> SelectionPlan:
    """longest: an upper bound of the segments' lengths that needs no look at the device."""
    per_span = max(1, (CANDIDATES - slots) // block + 1)
    several = longest > per_span * block
    segments = cuts.numel() - 1
    length = cuts.diff()
    blocks = (length + block - 1) // block
    spans = ((blocks + per_span - 1) // per_span).clamp(min=1)
    first_block = torch.cat([blocks.new_zeros(1), blocks.cumsum(0)])
    first_span = torch.cat([spans.new_zeros(1), spans.cumsum(0)])
    segment_index = torch.arange(segments, device=cuts.device)
    lists_before = segment_index + 1 if incoming else torch.zeros_like(segment_index)
    incoming_list = first_span[:-1] + segment_index if several else segment_index

    def span_start(segment: Tensor, ordinal: Tensor) -> Tensor:
        return cuts[segment] + ordinal * per_span * block

    def read(segment: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
        """The lists that hold what came before span number `span` of the segment."""
        if several:
            at = first_span[segment] + span
            return at, at + 1
        at = segment if incoming else torch.zeros_like(segment)
        return at, at + int(incoming)

    unit = torch.arange(units, device=cuts.device)
    segment = _segment_of(first_block, unit)
    ordinal = unit - first_block[segment]
    start = span_start(segment, ordinal // per_span)
    unit_jobs = _jobs(*read(segment, ordinal // per_span), start, cuts[segment] + ordinal * block)
    unit_jobs = torch.where((unit < first_block[-1])[:, None], unit_jobs, 0)

    closed = length // block
    last = ((closed + per_span - 1) // per_span - 1).clamp(min=0)
    final_jobs = _jobs(*read(segment_index, last), span_start(segment_index, last), cuts[:-1] + closed * block)

    span = torch.arange(tokens // (per_span * block) + segments, device=cuts.device)
    segment = _segment_of(first_span, span)
    ordinal = span - first_span[segment]
    own_list = span + lists_before[segment]
    own_jobs = prefix_jobs = None
    if several:
        real = (span < first_span[-1])[:, None]
        start = span_start(segment, ordinal)
        end = torch.minimum(start + per_span * block, cuts[segment + 1])
        nothing = torch.zeros_like(span)
        own_jobs = torch.where(real, _jobs(nothing, nothing, start, end), 0)
        from_list = first_span[segment] + (segment if incoming else 0)
        prefix_jobs = torch.where(real, _jobs(from_list, own_list, nothing, nothing), 0)
    lists = (longest - 1) // (per_span * block) + int(incoming)  # of all spans but the last
    return SelectionPlan(own_jobs, prefix_jobs, unit_jobs, final_jobs, own_list, incoming_list, lists)


def _segment_of(first: Tensor, index: Tensor) -> Tensor:
    return (torch.searchsorted(first, index, right=True) - 1).clamp(0, max(first.numel() - 2, 0))


def _jobs(*columns: Tensor) -> Tensor:
    return torch.stack(columns, 1).to(torch.int32)
