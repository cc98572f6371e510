"""Tables that tell a kernel which tokens its block holds (of the cache, a chunk of the state, a convolution's strip).

Built on the device without a host synchronisation: for packed documents the number of
blocks is bounded by the shapes alone, and the blocks after the last real one are empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.memo import by_shape, memoise
from hola_kernels.segments import dense_cu_seqlens

START, COUNT, INDEX, FOLLOWING, SEGMENT, FIELDS = range(6)  # columns of `entries`, and their number


@dataclass(frozen=True)
class BlockTable:
    """Segments of a flat token stream cut into blocks of `size` tokens; no block crosses a segment.

    entries       [U, FIELDS] int32: first token, number of tokens (0: no such block), index of the block in its
                  segment, how many blocks of the segment follow, segment
    first_block   [N + 1] int64: first block of every segment, and their total
    max_blocks    of a segment, from shapes alone
    """

    size: int
    entries: Tensor
    first_block: Tensor
    max_blocks: int

    @property
    def count(self) -> int:
        """U: rows of `entries`."""
        return self.entries.shape[0]


def block_table(cu_seqlens: Tensor, tokens: int, size: int, equal_length: bool) -> BlockTable:
    """cu_seqlens [N + 1] int64 on the device; equal_length: all N segments have tokens / N tokens."""
    if equal_length:
        return _equal_length_table(cu_seqlens.numel() - 1, tokens, size, cu_seqlens.device)
    return memoise(cu_seqlens, ("blocks", size, tokens),
                   lambda: _build(cu_seqlens, size, tokens // size + cu_seqlens.numel() - 1, -(-tokens // size)))


@by_shape
def _equal_length_table(segments: int, tokens: int, size: int, device: torch.device) -> BlockTable:
    length = tokens // max(segments, 1)
    blocks = -(-length // size)
    return _build(dense_cu_seqlens(segments, length, device), size, segments * blocks, blocks)


def _build(cu_seqlens: Tensor, size: int, blocks: int, max_blocks: int) -> BlockTable:
    length = cu_seqlens.diff()
    count = (length + size - 1) // size
    first = torch.cat([count.new_zeros(1), count.cumsum(0)])
    block = torch.arange(blocks, device=cu_seqlens.device)
    segment = (torch.searchsorted(first, block, right=True) - 1).clamp(0, max(length.numel() - 1, 0))
    index = block - first[segment]
    start = cu_seqlens[segment] + index * size
    real = block < first[-1]
    columns = [start, (cu_seqlens[segment + 1] - start).clamp(max=size), index, count[segment] - index - 1, segment]
    table = torch.where(real[:, None], torch.stack(columns, 1), 0)
    return BlockTable(size, table.to(torch.int32), first, max_blocks)
