"""One rank's tokens as the exact read's kernels see them: a stream of rows, with what came from other ranks around.

    rows     [ open block | this rank's tokens | cached tokens ]        the open block: of the first document only
    several rows of one document each (N): every open block stands before its row's tokens, all caches behind

Where nothing enters the rank, the stream is the tokens themselves and nothing is copied.

Shapes: N rows (1 for packed documents), T tokens of a row on this rank, C block, w slots, o tokens of the open block.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.exact_cache.triton_read import Blocks
from hola_kernels.memo import remember
from hola_kernels.segments import dense_cu_seqlens
from hola_megatron.parallel.part import Part


@dataclass(frozen=True)
class Stream:
    """Where everything lies: rows N, block C, slots w."""

    part: Part
    rows: int
    block: int
    slots: int

    @property
    def opened(self) -> int:
        """Tokens of the open block, which lie on the left neighbour."""
        return self.part.before % self.block

    @property
    def behind(self) -> int:
        """Cached tokens that enter a row."""
        return self.slots if self.part.before else 0

    @property
    def length(self) -> int:
        """Tokens of a row, open ones included."""
        return self.opened + self.part.tokens

    @property
    def tokens(self) -> int:
        """Rows of the stream before the cached ones."""
        return self.rows * self.length

    def lay(self, x: Tensor, behind: bool = False) -> Tensor:
        """x [N * T, ...] -> [tokens (+ N * w behind), ...], the places of others' tokens zero; x itself if it fits."""
        if not self.opened and not (behind and self.behind):
            return x
        laid = x.new_empty(self.tokens + (self.rows * self.behind if behind else 0), *x.shape[1:])
        self._rows(laid)[:, : self.opened].zero_()
        self.local(laid).copy_(x.unflatten(0, (self.rows, -1)))
        return laid

    def local(self, laid: Tensor) -> Tensor:
        """This rank's own tokens [N, T, ...], a view."""
        return self._rows(laid)[:, self.opened:]

    def open(self, laid: Tensor) -> Tensor:
        """The open block's tokens [N, o, ...], a view."""
        return self._rows(laid)[:, : self.opened]

    def cached(self, laid: Tensor) -> Tensor:
        """The cached tokens [N, H, w, D], a view."""
        return laid[self.tokens:].unflatten(0, (self.rows, -1)).transpose(1, 2)

    def flat(self, laid: Tensor) -> Tensor:
        """This rank's own tokens [N * T, ...], contiguous."""
        return self.local(laid).flatten(0, 1).contiguous()

    def blocks(self, device: torch.device) -> Blocks:
        """The stream cut into blocks; only its first document (every one of N rows) has a cache behind it."""
        incoming = self.behind > 0
        if self.part.cuts is None:
            cuts = dense_cu_seqlens(self.rows, self.length, device)
        else:
            cuts = remember(self.part.cuts, ("stream", self.opened, device), lambda: self._cuts(device))
        blocks = Blocks.cut(cuts, self.tokens, block=self.block, slots=self.slots, dense=self.part.cuts is None,
                            incoming=incoming)
        if not incoming:
            return blocks
        first = blocks.units.first[: self.rows + 1]
        return dataclasses.replace(blocks, units=dataclasses.replace(blocks.units, first=first))

    def closed_runs(self) -> tuple[tuple[int, int], ...]:
        """Rows [from, to) of the last documents' blocks that close on this rank."""
        start = 0 if self.part.is_one_document else self.opened + self.part.tokens - self.part.tail
        closed = (self.length - start) // self.block * self.block if self.part.goes_on else 0
        return tuple((n * self.length + start, n * self.length + start + closed) for n in range(self.rows))

    @property
    def documents(self) -> int:
        """Documents in the stream."""
        return self.rows if self.part.cuts is None else self.part.cuts.numel() - 1

    def position_of(self, row: Tensor) -> Tensor:
        """The place of rows [N, H, w] of `closed_runs` in their document; -1 stays."""
        first = self.part.before - self.opened if self.part.is_one_document else 0
        starts = [start for start, _ in self.closed_runs()]
        start = torch.arange(self.rows, device=row.device)[:, None, None] * self.length + starts[0]
        return torch.where(row < 0, -1, row - start + first)

    def _rows(self, laid: Tensor) -> Tensor:
        return laid[: self.tokens].unflatten(0, (self.rows, -1))

    def _cuts(self, device: torch.device) -> Tensor:
        cuts = self.part.cuts.long() + self.opened
        cuts[0] = 0
        return cuts.to(device, non_blocking=True)
