"""Where the chunks lie: tables the kernels index, made once for each packing.

A chunk is up to 64 consecutive tokens of one segment; a span is a run of consecutive
chunks of one segment that one program walks over. Chunks of a segment are numbered in
order and segments follow each other, so a span is (first token, end token, first chunk).

`layout_of` reads the cuts on the CPU and makes tables of just the chunks there are. `bounded_layout` reads nothing:
its tables are as long as the shapes alone can ask for, and made on the device, so that a CUDA graph holds for any
cuts of as many documents.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.memo import hold, remember
from hola_kernels.transfer import sent
from hola_kernels.unit_table import COUNT, START, unit_table

CHUNK = 64


@dataclass(frozen=True)
class Layout:
    """chunks [U, 2] int32: first token and number of tokens of each chunk (0: no such chunk)
    spans [P, 3] int32: first token, end token, first chunk of each span (no tokens: no such span)
    segment_spans [N, 2] int32: first span of each segment and how many it has (at least one, maybe empty)
    most_spans: of any segment; 1 when nothing is split
    end_spans: how many the first and the last segment have; not known of a bounded layout
    """

    chunks: Tensor
    spans: Tensor
    segment_spans: Tensor
    most_spans: int
    end_spans: tuple[int, int] = (0, 0)

    @property
    def chunk_count(self) -> int:
        return self.chunks.shape[0]

    @property
    def span_count(self) -> int:
        return self.spans.shape[0]

    @property
    def segment_count(self) -> int:
        return self.segment_spans.shape[0]


_known: dict[int, tuple[weakref.ref, list[int], dict[tuple[str, int], Layout]]] = {}


def lengths_of(cu_seqlens: Tensor) -> list[int]:
    """The segments' lengths; the cuts are read once, and kept as long as that very tensor lives.

    Reading them waits for the device when the tensor is new and lies there, never when it lies on the CPU.
    """
    cuts = _remember(cu_seqlens)[1]
    return [end - start for start, end in zip(cuts[:-1], cuts[1:], strict=True)]


def layout_of(cu_seqlens: Tensor, device: torch.device, span_chunks: int) -> Layout:
    """The layout of segments cut at cu_seqlens [N + 1] in spans of at most span_chunks, kept like the cuts."""
    _, cuts, layouts = _remember(cu_seqlens)
    key = (str(device), span_chunks)
    if key not in layouts:
        layouts[key] = cut_spans(cuts, device, span_chunks)
    return hold(layouts[key])


def bounded_layout(cuts: Tensor, tokens: int, span_chunks: int, split: bool) -> Layout:
    """The layout of M tokens cut at cuts [N + 1] int64 on the device, none of them read on the host.

    At most M // 64 + N chunks. split: a segment may be longer than span_chunks; else each is one span, of any length.
    """
    return remember(cuts, ("layout", tokens, span_chunks, split), lambda: _bound(cuts, tokens, span_chunks, split))


def _bound(cuts: Tensor, tokens: int, span_chunks: int, split: bool) -> Layout:
    chunks = unit_table(cuts, tokens, CHUNK, dense=False)
    of_chunk = chunks.table[:, START : COUNT + 1].contiguous()  # neighbours; a list of columns would be sent there
    segments = torch.arange(cuts.numel() - 1, device=cuts.device)

    def table(*columns: Tensor) -> Tensor:
        return torch.stack(columns, 1).to(torch.int32)

    if not split:
        spans = table(cuts[:-1], cuts[1:], chunks.first[:-1])
        return Layout(of_chunk, spans, table(segments, torch.ones_like(segments)), most_spans=1)
    size = span_chunks * CHUNK
    count = ((cuts.diff() + size - 1) // size).clamp(min=1)
    first_span = torch.cat([count.new_zeros(1), count.cumsum(0)])
    span = torch.arange(tokens // size + segments.numel(), device=cuts.device)
    segment = (torch.searchsorted(first_span, span, right=True) - 1).clamp(0, segments.numel() - 1)
    ordinal = span - first_span[segment]
    first = cuts[segment] + ordinal * size
    spans = table(first, torch.minimum(first + size, cuts[segment + 1]),
                  chunks.first[segment] + ordinal * span_chunks)
    spans = torch.where((span < first_span[-1])[:, None], spans, 0)
    return Layout(of_chunk, spans, table(first_span[:-1], count), most_spans=span.numel())


def _remember(cu_seqlens: Tensor) -> tuple[weakref.ref, list[int], dict[tuple[str, int], Layout]]:
    key = id(cu_seqlens)
    known = _known.get(key)
    if known is None or known[0]() is not cu_seqlens:
        known = (weakref.ref(cu_seqlens, lambda _: _known.pop(key, None)), cu_seqlens.tolist(), {})
        _known[key] = known
    return known


def cut_spans(cuts: list[int], device: torch.device, span_chunks: int) -> Layout:
    start, end = torch.tensor(cuts[:-1]), torch.tensor(cuts[1:])
    chunk_first, chunk_last, first_chunk = _cut(start, end, CHUNK)
    span_first, span_last, first_span = _cut(start, end, span_chunks * CHUNK, at_least=1)
    segment = torch.bucketize(torch.arange(span_first.numel()), first_span, right=True) - 1
    span_chunk = first_chunk[segment] + (span_first - start[segment]) // CHUNK
    spans_of = torch.diff(first_span, append=torch.tensor([span_first.numel()]))

    def table(*columns: Tensor) -> Tensor:
        return sent(torch.stack(columns, 1).to(torch.int32), device)

    counts = spans_of.tolist() or [0]
    return Layout(table(chunk_first, chunk_last - chunk_first), table(span_first, span_last, span_chunk),
                  table(first_span, spans_of), max(counts), (counts[0], counts[-1]))


def _cut(start: Tensor, end: Tensor, size: int, at_least: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces of `size` tokens: first token and end token of each, and the first piece of each segment."""
    count = ((end - start + size - 1) // size).clamp_min(at_least)
    first_piece = count.cumsum(0) - count
    segment = torch.repeat_interleave(torch.arange(count.numel()), count)
    ordinal = torch.arange(segment.numel()) - first_piece[segment]
    first = start[segment] + ordinal * size
    return first, torch.minimum(first + size, end[segment]), first_piece
