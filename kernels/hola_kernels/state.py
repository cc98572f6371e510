"""What a HOLA layer remembers between calls: constant size at any length."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class HolaState:
    """Memory of N sequences. Empty cache slots have score -inf and position -1.

    state           [N, H, K, V] float32 (float64 in float64 calls): the compressed memory
    cache_k         [N, H, w, K], cache_v [N, H, w, V]: the exact tokens, keys not normalised,
                    in order of position
    cache_score     [N, H, w] float32, cache_position [N, H, w] int64 (counted in the sequence)
    open_k          [N, C, H, K], open_v [N, C, H, V], open_score [N, C, H]: the block not yet full
    length          [N] int64: tokens seen; length % C of them are in the open block
    """

    state: Tensor
    cache_k: Tensor
    cache_v: Tensor
    cache_score: Tensor
    cache_position: Tensor
    open_k: Tensor
    open_v: Tensor
    open_score: Tensor
    length: Tensor

    @classmethod
    def empty(cls, sequences: int, heads: int, key_dim: int, value_dim: int, *, block: int = 256, slots: int = 64,
              dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> HolaState:
        """The memory before the first token; `dtype` is that of the k and v that will be kept."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            state=zeros(sequences, heads, key_dim, value_dim, dtype=wide),
            cache_k=zeros(sequences, heads, slots, key_dim),
            cache_v=zeros(sequences, heads, slots, value_dim),
            cache_score=zeros(sequences, heads, slots, dtype=wide) - torch.inf,
            cache_position=zeros(sequences, heads, slots, dtype=torch.int64) - 1,
            open_k=zeros(sequences, block, heads, key_dim),
            open_v=zeros(sequences, block, heads, value_dim),
            open_score=zeros(sequences, block, heads, dtype=wide),
            length=zeros(sequences, dtype=torch.int64),
        )

    @property
    def block(self) -> int:
        return self.open_k.shape[1]

    @property
    def slots(self) -> int:
        return self.cache_k.shape[2]

    @property
    def open_count(self) -> Tensor:
        """[N] int64: tokens in the open block."""
        return self.length % self.block

    def select(self, rows: Tensor) -> HolaState:
        """The memories of the sequences `rows` [R] (beam search, batch reordering), as copies."""
        return HolaState(**{f.name: getattr(self, f.name).index_select(0, rows) for f in fields(self)})

    def nbytes(self) -> int:
        """Bytes held, the same at any length."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))
