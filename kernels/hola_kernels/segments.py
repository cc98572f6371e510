"""Sequences of any lengths padded to whole blocks (chunks of the state, blocks of the cache).

Every operation works on a flat list of tokens [M, H, *] cut into N segments by
cu_seqlens: a batch [B, T] is B segments of T tokens, packed documents are their own
segments. A block never crosses a segment, so nothing leaks from one document to the
next, whatever the lengths; the last block of a segment may be partly empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.memo import by_shape, mark_constant


def dense_cu_seqlens(batch: int, length: int, device: torch.device) -> Tensor:
    """[B + 1] int64: B rows of T tokens, flattened."""
    return torch.arange(batch + 1, device=device, dtype=torch.int64) * length


@by_shape
def rows_as_segments(batch: int, length: int, device: torch.device) -> Tensor:
    """`dense_cu_seqlens`, one tensor for a shape: what was made from it is found again. Nobody may write into it."""
    return mark_constant(dense_cu_seqlens(batch, length, device))


@dataclass(frozen=True)
class PaddedBlocks:
    """Where each token of each segment lies when segments are cut into blocks of `size` tokens.

    token_index      [U, size] int64: flat token at each offset; M + n * open_size + p for the p-th token that segment n
                     carries in an open block; `empty` where there is none
    valid            [U, size] bool: a token of this call or of an open block
    segment          [U] int64: the block's segment
    block_index      [U] int64: index of the block in its segment
    flat_index       [M] int64: the inverse of token_index, for the tokens of this call
    blocks_by_index  for each block index, the blocks that have it (one step of a scan over blocks)
    """

    size: int
    token_index: Tensor
    valid: Tensor
    segment: Tensor
    block_index: Tensor
    flat_index: Tensor
    blocks_by_index: list[Tensor]
    empty: int

    def pad(self, tokens: Tensor, open_tokens: Tensor | None = None) -> Tensor:
        """tokens [M, ...] (and open_tokens [N, open_size, ...]) -> [U, size, ...], zeros where empty."""
        missing = self.empty - tokens.shape[0]
        if not missing and self.token_index.numel() == tokens.shape[0]:
            return tokens.unflatten(0, (-1, self.size))  # whole blocks, one after the other: nothing to move
        if missing and open_tokens is not None:
            tokens = torch.cat([tokens, open_tokens.flatten(0, 1).to(tokens.dtype)])
            missing = 0
        tokens = torch.cat([tokens, tokens.new_zeros(missing + 1, *tokens.shape[1:])])
        # index_select, not indexing: its backward adds rows instead of sorting indices
        return tokens.index_select(0, self.token_index.flatten()).unflatten(0, (-1, self.size))

    def unpad(self, padded: Tensor) -> Tensor:
        """[U, size, ...] -> [M, ...]: the tokens of this call, in their order."""
        flat = padded.flatten(0, 1)
        return flat if flat.shape[0] == self.flat_index.shape[0] else flat.index_select(0, self.flat_index)


def cut_blocks(cu_seqlens: Tensor, size: int, open_count: Tensor | None = None,
               open_size: int | None = None) -> PaddedBlocks:
    """Cut segments into blocks of `size` tokens.

    cu_seqlens [N + 1] integer: segment n holds flat tokens cu_seqlens[n]:cu_seqlens[n + 1] (may be empty).
    open_count [N] integer: tokens that segment n carries in open blocks (0 when None).
    open_size: rows of a segment among the carried tokens; None: `size`.
    """
    device = cu_seqlens.device
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    tokens, segments = int(cu_seqlens[-1]), start.numel()
    open_size = open_size or size
    open_tokens = torch.zeros_like(start) if open_count is None else open_count.long()
    filled = open_tokens + end - start
    blocks = (filled + size - 1) // size
    first_block = blocks.cumsum(0) - blocks
    segment = torch.repeat_interleave(torch.arange(segments, device=device), blocks)
    block_index = torch.arange(segment.numel(), device=device) - first_block[segment]

    within = block_index[:, None] * size + torch.arange(size, device=device)
    valid = within < filled[segment, None]
    is_carried = within < open_tokens[segment, None]
    token_index = torch.where(is_carried, tokens + segment[:, None] * open_size + within,
                              within - open_tokens[segment, None] + start[segment, None])
    empty = tokens + (segments * open_size if open_count is not None else 0)
    token_index = torch.where(valid, token_index, empty)

    flat_index = torch.zeros(tokens, dtype=torch.int64, device=device)
    of_this_call = valid & ~is_carried
    flat = torch.arange(token_index.numel(), device=device).view_as(token_index)
    flat_index[token_index[of_this_call]] = flat[of_this_call]
    longest = int(blocks.max()) if segments else 0
    blocks_by_index = [torch.nonzero(block_index == j).squeeze(1) for j in range(longest)]
    return PaddedBlocks(size, token_index, valid, segment, block_index, flat_index, blocks_by_index, empty)
