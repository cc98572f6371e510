"""Tables that tell a kernel which tokens its unit (a block of the cache, a strip of the convolution) holds.

Built on the device without a host synchronisation: for packed documents the number of
units is bounded by the shapes alone, and the units beyond the last real one are empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.memo import by_shape, remember
from hola_kernels.segments import dense_cu_seqlens

START, COUNT, ORDINAL, FOLLOWING, SEGMENT, COLUMNS = 0, 1, 2, 3, 4, 5


@dataclass(frozen=True)
class UnitTable:
    """Segments of a flat token stream cut into units of `size` tokens; no unit crosses a segment.

    table   [U, 5] int32: first token, number of tokens (0: no such unit), number of the unit in its
            segment, how many units of the segment follow, segment
    first   [N + 1] int64: first unit of every segment, and their total
    most    units that a segment can have at most, from shapes alone
    """

    size: int
    table: Tensor
    first: Tensor
    most: int

    @property
    def units(self) -> int:
        return self.table.shape[0]


def unit_table(cuts: Tensor, tokens: int, size: int, dense: bool) -> UnitTable:
    """cuts [N + 1] int64 on the device; dense: all N segments have tokens / N tokens."""
    if dense:
        return _dense_table(cuts.numel() - 1, tokens, size, cuts.device)
    return remember(cuts, ("units", size, tokens),
                    lambda: _build(cuts, size, tokens // size + cuts.numel() - 1, -(-tokens // size)))


@by_shape
def _dense_table(segments: int, tokens: int, size: int, device: torch.device) -> UnitTable:
    length = tokens // max(segments, 1)
    most = -(-length // size)
    return _build(dense_cu_seqlens(segments, length, device), size, segments * most, most)


def _build(cuts: Tensor, size: int, units: int, most: int) -> UnitTable:
    length = cuts.diff()
    count = (length + size - 1) // size
    first = torch.cat([count.new_zeros(1), count.cumsum(0)])
    unit = torch.arange(units, device=cuts.device)
    segment = (torch.searchsorted(first, unit, right=True) - 1).clamp(0, max(length.numel() - 1, 0))
    ordinal = unit - first[segment]
    start = cuts[segment] + ordinal * size
    real = unit < first[-1]
    columns = [start, (cuts[segment + 1] - start).clamp(max=size), ordinal, count[segment] - ordinal - 1, segment]
    table = torch.where(real[:, None], torch.stack(columns, 1), 0)
    return UnitTable(size, table.to(torch.int32), first, most)
