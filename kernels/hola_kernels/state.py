"""The memory of a layer between calls: constant size at any length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from hola_kernels.options import CacheOptions

Memory = TypeVar("Memory", bound="SequenceState")


class SequenceState:
    """What every layer's memory of N sequences can do; a dataclass of tensors with the sequences on axis 0."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by name; those of a memory within it as "name.its_name"."""
        found = {}
        for name, held in self._held().items():
            found |= {name: held} if isinstance(held, Tensor) else {f"{name}.{n}": x for n, x in held.tensors().items()}
        return found

    def _held(self) -> dict[str, Tensor | SequenceState]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, Tensor | SequenceState)}

    def map(self: Memory, change: Callable[[Tensor], Tensor]) -> Memory:
        """A memory of change(tensor) for every tensor."""
        return replace(self, **{name: change(x) if isinstance(x, Tensor) else x.map(change)
                                for name, x in self._held().items()})

    def select(self: Memory, rows: Tensor) -> Memory:
        """The memories of the sequences `rows` [R] (beam search, batch reordering), as copies."""
        return self.map(lambda x: x.index_select(0, rows))

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in self.tensors().values())


@dataclass
class DelayedState(SequenceState):
    """Memory of N sequences.

    state   [N, H, K, V] float32 (float64 in float64 calls): stream S_{t-W}, chunk S_t
    read    [N, H, K, V]: chunk: S before the open chunk; stream: of H = 0
    k [N, W, H, K], v [N, W, H, V], log_decay, beta [N, W, H]: the last W tokens, token n at index n mod W, zero where
            there is none; chunk: of W = 0
    length  [N] int64: tokens seen
    """

    state: Tensor
    read: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor
    length: Tensor

    @classmethod
    def empty(cls, sequences: int, heads: int, key_dim: int, value_dim: int, *, delay: int, mode: str,
              dtype: torch.dtype, device: torch.device | str) -> DelayedState:
        """The memory before the first token; dtype: of k and v."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        pending, reads = (delay, 0) if mode == "stream" else (0, heads)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(zeros(sequences, heads, key_dim, value_dim, dtype=compute),
                   zeros(sequences, reads, key_dim, value_dim, dtype=compute),
                   zeros(sequences, pending, heads, key_dim, dtype=dtype),
                   zeros(sequences, pending, heads, value_dim, dtype=dtype),
                   zeros(sequences, pending, heads, dtype=compute), zeros(sequences, pending, heads, dtype=compute),
                   zeros(sequences, dtype=torch.int64))


@dataclass
class HolaState(SequenceState):
    """Memory of N sequences. Empty cache slots have score -inf and position -1.

    state           [N, H, K, V] float32 (float64 in float64 calls): the compressed memory; [N, H, 0, V] in a memory of
                    `exact_attention`, which has none
    cache_k         [N, H, w, K], cache_v [N, H, w, V]: the exact tokens, keys not normalised,
                    in order of position
    cache_score     [N, H, w] float32, cache_position [N, H, w] int64 (counted in the sequence)
    open_k          [N, (1 + P) C, H, K], open_v [N, (1 + P) C, H, V], open_score [N, (1 + P) C, H]: the block not yet
                    full, and before it the last P full blocks, which are not merged into the cache yet
    length          [N] int64: tokens seen; `open_count` of them are in the open blocks
    window_blocks   P: full blocks that a sliding window reaches back into; 0 where the local part is the block
    rope_theta      the base of the rotary positions that its keys have; None: they have none
    late            with a state that is read D tokens late, that state (mode "stream") and its tokens; `state` and the
                    scores are those of all tokens; None: without a delay
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
    window_blocks: int = 0
    rope_theta: float | None = None
    late: DelayedState | None = None

    @classmethod
    def empty(cls, sequences: int, heads: int, key_dim: int, value_dim: int, *, block: int = CacheOptions.block,
              slots: int = CacheOptions.slots, window_blocks: int = 0, rope_theta: float | None = None,
              state_delay: int = 0, recurrent: bool = True, dtype: torch.dtype = torch.float32,
              device: torch.device | str = "cpu") -> HolaState:
        """The memory before the first token; `dtype` is that of the k and v that will be stored.

        recurrent: False for `exact_attention`, which has no compressed memory.
        """
        compute = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            state=zeros(sequences, heads, key_dim if recurrent else 0, value_dim, dtype=compute),
            cache_k=zeros(sequences, heads, slots, key_dim),
            cache_v=zeros(sequences, heads, slots, value_dim),
            cache_score=zeros(sequences, heads, slots, dtype=compute) - torch.inf,
            cache_position=zeros(sequences, heads, slots, dtype=torch.int64) - 1,
            open_k=zeros(sequences, (1 + window_blocks) * block, heads, key_dim),
            open_v=zeros(sequences, (1 + window_blocks) * block, heads, value_dim),
            open_score=zeros(sequences, (1 + window_blocks) * block, heads, dtype=compute),
            length=zeros(sequences, dtype=torch.int64),
            window_blocks=window_blocks,
            rope_theta=rope_theta,
            late=None if not state_delay else DelayedState.empty(
                sequences, heads, key_dim, value_dim, delay=state_delay, mode="stream", dtype=dtype, device=device),
        )

    @property
    def recurrent(self) -> bool:
        """Whether it has a compressed memory."""
        return self.state.shape[-2:-1] != (0,)

    @property
    def block(self) -> int:
        return self.open_k.shape[1] // (1 + self.window_blocks)

    @property
    def slots(self) -> int:
        return self.cache_k.shape[2]

    @property
    def state_delay(self) -> int:
        return 0 if self.late is None else self.late.k.shape[1]

    @property
    def open_count(self) -> Tensor:
        """[N] int64: tokens in the open blocks."""
        return self.length - merged_tokens(self.length, self.block, self.window_blocks)


def merged_tokens(length: Tensor, block: int, window_blocks: int) -> Tensor:
    """[N]: of `length` [N] tokens, those whose blocks are merged into the cache: all full ones but the last P."""
    return (length // block - window_blocks).clamp(min=0) * block
