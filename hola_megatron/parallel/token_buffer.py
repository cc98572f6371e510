"""The token buffer of the cache attention kernels: one rank's tokens with those received from other ranks.

    buffer   [ carried tokens | this rank's tokens | cached tokens ]

Carried tokens belong to the first document's incomplete block and are received from the left neighbour. With N rows of
one document each, every row has its carried tokens before its own, and all cached tokens come last. Where a rank
receives no tokens, the buffer is the input tensor itself, without a copy.

Shapes: N rows (1 for packed documents), T tokens of a row on this rank, C block, w slots, o carried tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.stages import CacheOptions, dense_cu_seqlens, mark_constant, memoise
from hola_kernels.triton_stages import CacheBlocks
from hola_megatron.parallel.sequence_shard import SequenceShard


@dataclass(frozen=True)
class TokenBuffer:
    """The layout of the buffer: rows N; block C and slots w of the options."""

    shard: SequenceShard
    rows: int
    options: CacheOptions

    @property
    def block(self) -> int:
        return self.options.block

    @property
    def slots(self) -> int:
        return self.options.slots

    @property
    def carried(self) -> int:
        """Number of tokens per row that are received from the left neighbour (o)."""
        return self.shard.before % self.block

    @property
    def cached_in(self) -> int:
        """Number of cached tokens per row that are received from earlier ranks."""
        return self.slots if self.shard.before else 0

    @property
    def length(self) -> int:
        """Tokens per row of the buffer, carried ones included."""
        return self.carried + self.shard.tokens

    @property
    def tokens(self) -> int:
        """Tokens of the buffer before the cached ones."""
        return self.rows * self.length

    def concat(self, x: Tensor, with_cached: bool = False) -> Tensor:
        """x [N * T, ...] -> [tokens (+ N * w), ...], zeros for carried tokens; x itself where there are none."""
        if not self.carried and not (with_cached and self.cached_in):
            return x
        whole = x.new_empty(self.tokens + (self.rows * self.cached_in if with_cached else 0), *x.shape[1:])
        self._rows(whole)[:, : self.carried].zero_()
        self.local(whole).copy_(x.unflatten(0, (self.rows, -1)))
        return whole

    def local(self, whole: Tensor) -> Tensor:
        """This rank's own tokens [N, T, ...], a view."""
        return self._rows(whole)[:, self.carried:]

    def carried_tokens(self, whole: Tensor) -> Tensor:
        """The carried tokens [N, o, ...], a view."""
        return self._rows(whole)[:, : self.carried]

    def cached(self, whole: Tensor) -> Tensor:
        """The cached tokens [N, H, w, D], a view."""
        return whole[self.tokens:].unflatten(0, (self.rows, -1)).transpose(1, 2)

    def flat(self, whole: Tensor) -> Tensor:
        """This rank's own tokens [N * T, ...], contiguous."""
        return self.local(whole).flatten(0, 1).contiguous()

    def blocks(self, device: torch.device) -> CacheBlocks:
        """The block tables of the buffer; only the first document (of every row) has cached tokens from other ranks."""
        incoming = self.cached_in > 0
        if self.shard.documents is None:
            cu_seqlens = dense_cu_seqlens(self.rows, self.length, device)
        else:
            cu_seqlens = memoise(self.shard.documents.host(), ("token buffer", self.carried, device),
                                 lambda: mark_constant(self._cu_seqlens(device)))
        blocks = CacheBlocks.cut(cu_seqlens, self.tokens, self.options,
                                 equal_length=self.shard.documents is None, incoming=incoming)
        if not incoming:
            return blocks
        first_block = blocks.table.first_block[: self.rows + 1]
        return dataclasses.replace(blocks, table=dataclasses.replace(blocks.table, first_block=first_block))

    def closed_runs(self) -> tuple[tuple[int, int], ...]:
        """Rows [from, to) of the buffer: the last document's blocks that end on this rank, for every row."""
        start = 0 if self.shard.is_one_document else self.carried + self.shard.tokens - self.shard.tail
        closed = (self.length - start) // self.block * self.block if self.shard.continues else 0
        return tuple((n * self.length + start, n * self.length + start + closed) for n in range(self.rows))

    @property
    def documents(self) -> int:
        """Documents in the buffer."""
        return self.shard.sequences(self.rows)

    def position_of(self, row: Tensor) -> Tensor:
        """Positions in the document of the buffer rows [N, H, w] (rows of `closed_runs`); -1 stays -1."""
        first = self.shard.before - self.carried if self.shard.is_one_document else 0
        starts = [start for start, _ in self.closed_runs()]
        start = torch.arange(self.rows, device=row.device)[:, None, None] * self.length + starts[0]
        return torch.where(row < 0, -1, row - start + first)

    def _rows(self, whole: Tensor) -> Tensor:
        return whole[: self.tokens].unflatten(0, (self.rows, -1))

    def _cu_seqlens(self, device: torch.device) -> Tensor:
        cu_seqlens = self.shard.documents.host() + self.carried
        cu_seqlens[0] = 0
        return cu_seqlens.to(device, non_blocking=True)
