"""Sequences of any lengths laid out in whole units (chunks of the state, blocks of the cache).

Every operation works on a flat list of tokens [M, H, *] cut into N segments by
cu_seqlens: a batch [B, T] is B segments of T tokens, packed documents are their own
segments. A unit never crosses a segment, so nothing leaks from one document to the
next, whatever the lengths; the last unit of a segment may be partly empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.memo import by_shape


def dense_cu_seqlens(batch: int, length: int, device: torch.device) -> Tensor:
    """[B + 1] int64 cuts of a dense batch flattened to B * T tokens."""
    return torch.arange(batch + 1, device=device, dtype=torch.int64) * length


@by_shape
def rows_as_segments(batch: int, length: int, device: torch.device) -> Tensor:
    """`dense_cu_seqlens`, one tensor for a shape: what was made from it is found again. Nobody may write into it."""
    with torch.inference_mode(False):
        return dense_cu_seqlens(batch, length, device)


@dataclass(frozen=True)
class Units:
    """Where each token of each segment lies when segments are cut into units of `size` tokens.

    index    [U, size] int64: flat token of each place; M + n * size + p for the p-th token that
                       segment n brings along in an open unit; `empty` where there is none
    valid    [U, size] bool: a token of this call or an open one
    segment  [U] int64, ordinal [U] int64: which segment, and which unit of it
    place    [M] int64: the inverse of index, for the tokens of this call
    rows     for each ordinal, the units that have it (one step of a scan over units)
    """

    size: int
    index: Tensor
    valid: Tensor
    segment: Tensor
    ordinal: Tensor
    place: Tensor
    rows: list[Tensor]
    empty: int

    def pad(self, tokens: Tensor, open_tokens: Tensor | None = None) -> Tensor:
        """tokens [M, ...] (and open_tokens [N, size, ...]) -> [U, size, ...], zeros where empty."""
        missing = self.empty - tokens.shape[0]
        if not missing and self.index.numel() == tokens.shape[0]:
            return tokens.unflatten(0, (-1, self.size))  # whole units, one after the other: nothing to move
        if missing and open_tokens is not None:
            tokens = torch.cat([tokens, open_tokens.flatten(0, 1).to(tokens.dtype)])
            missing = 0
        tokens = torch.cat([tokens, tokens.new_zeros(missing + 1, *tokens.shape[1:])])
        # index_select, not indexing: its backward adds rows instead of sorting indices
        return tokens.index_select(0, self.index.flatten()).unflatten(0, (-1, self.size))

    def unpad(self, padded: Tensor) -> Tensor:
        """[U, size, ...] -> [M, ...]: the tokens of this call, in their order."""
        flat = padded.flatten(0, 1)
        return flat if flat.shape[0] == self.place.shape[0] else flat.index_select(0, self.place)


def cut_units(cu_seqlens: Tensor, size: int, open_count: Tensor | None = None) -> Units:
    """Cut segments into units of `size` tokens.

    cu_seqlens [N + 1] integer: segment n holds flat tokens cu_seqlens[n]:cu_seqlens[n + 1] (may be empty).
    open_count [N] integer: tokens that segment n brings in a unit already begun (0 when None).
    """
    device = cu_seqlens.device
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    tokens, segments = int(cu_seqlens[-1]), start.numel()
    opened = torch.zeros_like(start) if open_count is None else open_count.long()
    filled = opened + end - start
    units = (filled + size - 1) // size
    first_unit = units.cumsum(0) - units
    segment = torch.repeat_interleave(torch.arange(segments, device=device), units)
    ordinal = torch.arange(segment.numel(), device=device) - first_unit[segment]

    within = ordinal[:, None] * size + torch.arange(size, device=device)
    valid = within < filled[segment, None]
    is_open = within < opened[segment, None]
    index = torch.where(is_open, tokens + segment[:, None] * size + within,
                        within - opened[segment, None] + start[segment, None])
    empty = tokens + (segments * size if open_count is not None else 0)
    index = torch.where(valid, index, empty)

    place = torch.zeros(tokens, dtype=torch.int64, device=device)
    of_this_call = valid & ~is_open
    flat = torch.arange(index.numel(), device=device).view_as(index)
    place[index[of_this_call]] = flat[of_this_call]
    longest = int(units.max()) if segments else 0
    rows = [torch.nonzero(ordinal == j).squeeze(1) for j in range(longest)]
    return Units(size, index, valid, segment, ordinal, place, rows, empty)
