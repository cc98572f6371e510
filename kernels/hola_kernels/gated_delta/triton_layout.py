"""Where the chunks lie: tables the kernels index, made once for each packing.

A chunk is up to 64 consecutive tokens of one segment; a span is a run of consecutive
chunks of one segment that one program loops over. Chunks of a segment are numbered in
order and segments follow each other, so a span is (first token, end token, first chunk).

`layout_of` reads cu_seqlens on the CPU and makes tables of just the chunks there are. `bounded_layout` reads nothing:
its tables are as long as the shapes alone can ask for, and made on the device, so that a CUDA graph holds for any
cu_seqlens of as many documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.block_table import COUNT, START, block_table
from hola_kernels.memo import memoise
from hola_kernels.transfer import sent

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


def lengths_of(cu_seqlens: Tensor) -> list[int]:
    """The segments' lengths. Reading them waits for the device where cu_seqlens lies there."""
    bounds = _numbers(cu_seqlens)
    return [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def layout_of(cu_seqlens: Tensor, device: torch.device, span_chunks: int) -> Layout:
    """The layout of segments cut at cu_seqlens [N + 1] in spans of at most span_chunks, made once a constant tensor."""
    return memoise(cu_seqlens, ("spans", device, span_chunks),
                   lambda: cut_spans(_numbers(cu_seqlens), device, span_chunks))


def _numbers(cu_seqlens: Tensor) -> list[int]:
    return memoise(cu_seqlens, "numbers", cu_seqlens.tolist)


def bounded_layout(cu_seqlens: Tensor, tokens: int, span_chunks: int, split: bool) -> Layout:
    """The layout of M tokens cut at cu_seqlens [N + 1] int64 on the device, none of them read on the host.

    At most M // 64 + N chunks. split: a segment may be longer than span_chunks; else each is one span, of any length.
    """
    return memoise(cu_seqlens, ("layout", tokens, span_chunks, split),
                   lambda: _bound(cu_seqlens, tokens, span_chunks, split))


def _bound(cu_seqlens: Tensor, tokens: int, span_chunks: int, split: bool) -> Layout:
    chunks = block_table(cu_seqlens, tokens, CHUNK, equal_length=False)
    of_chunk = chunks.entries[:, START : COUNT + 1].contiguous()  # neighbours; a list of columns would be sent there
    segments = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)

    def table(*columns: Tensor) -> Tensor:
        return torch.stack(columns, 1).to(torch.int32)

    if not split:
        spans = table(cu_seqlens[:-1], cu_seqlens[1:], chunks.first_block[:-1])
        return Layout(of_chunk, spans, table(segments, torch.ones_like(segments)), most_spans=1)
    size = span_chunks * CHUNK
    count = ((cu_seqlens.diff() + size - 1) // size).clamp(min=1)
    first_span = torch.cat([count.new_zeros(1), count.cumsum(0)])
    span = torch.arange(tokens // size + segments.numel(), device=cu_seqlens.device)
    segment = (torch.searchsorted(first_span, span, right=True) - 1).clamp(0, segments.numel() - 1)
    index = span - first_span[segment]
    first = cu_seqlens[segment] + index * size
    spans = table(first, torch.minimum(first + size, cu_seqlens[segment + 1]),
                  chunks.first_block[segment] + index * span_chunks)
    spans = torch.where((span < first_span[-1])[:, None], spans, 0)
    return Layout(of_chunk, spans, table(first_span[:-1], count), most_spans=span.numel())


def cut_spans(bounds: list[int], device: torch.device, span_chunks: int) -> Layout:
    start, end = torch.tensor(bounds[:-1]), torch.tensor(bounds[1:])
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
    index = torch.arange(segment.numel()) - first_piece[segment]
    first = start[segment] + index * size
    return first, torch.minimum(first + size, end[segment]), first_piece
