"""The kept tokens of sequences that are decoded: a memory that grows with what is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.errors import KernelError
from hola_kernels.state import SequenceState

LEAST_CAPACITY = 64


@dataclass
class KeptTokens(SequenceState):
    """Kept tokens of N sequences, per head in order of position. Heads and sequences differ in how many they keep: all
    have room for `capacity` tokens, which doubles when the fullest one needs more. What comes after `count` is not
    read.

    k             [N, C, H, K], v [N, C, H, V]: as they were given to the read
    log_weight    [N, C, H] float32 (float64 in float64 calls): added to the logits; zeros without log weights
    position      [N, C, H] int64, counted in the sequence
    count         [N, H] int64: tokens kept
    length        [N] int64: tokens seen
    bound         no count is larger; kept on the host, so that a step waits for the device only where this says full
    """

    k: Tensor
    v: Tensor
    log_weight: Tensor
    position: Tensor
    count: Tensor
    length: Tensor
    bound: int = 0

    @classmethod
    def empty(cls, sequences: int, heads: int, key_dim: int, value_dim: int, *, capacity: int = LEAST_CAPACITY,
              dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> KeptTokens:
        """The memory before the first token; `dtype` is that of the k and v that will be kept."""
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise KernelError(f"capacity = {capacity!r} must be a whole number of at least 1")
        compute = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(k=zeros(sequences, capacity, heads, key_dim, dtype=dtype),
                   v=zeros(sequences, capacity, heads, value_dim, dtype=dtype),
                   log_weight=zeros(sequences, capacity, heads, dtype=compute),
                   position=zeros(sequences, capacity, heads, dtype=torch.int64),
                   count=zeros(sequences, heads, dtype=torch.int64), length=zeros(sequences, dtype=torch.int64))

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, keep: Tensor, log_weight: Tensor | None) -> None:
        """Take in what is kept of the next tokens: k [N, T, H, K], v [N, T, H, V], keep and log_weight [N, T, H]."""
        tokens, kept = keep.shape[1], keep.long()
        self._make_room(tokens, kept)
        index = self.count[:, None] + kept.cumsum(1) - kept
        n, t, h = torch.nonzero(keep, as_tuple=True) if tokens > 1 else self._one_each(keep)
        at, taken = (n, index[n, t, h], h), keep[n, t, h]
        new = {"k": k, "v": v, "position": (self.length[:, None] + torch.arange(tokens, device=k.device))[..., None]}
        new["position"] = new["position"].expand(keep.shape)
        new["log_weight"] = torch.zeros_like(self.log_weight[:, :1]).expand(keep.shape) if log_weight is None else (
            log_weight)
        for name, x in new.items():
            held = getattr(self, name)
            chosen = x[n, t, h].to(held.dtype)
            held[at] = torch.where(taken.view(-1, *[1] * (chosen.ndim - 1)), chosen, 0)
        self.count += kept.sum(1)
        self.length += tokens

    def _make_room(self, tokens: int, kept: Tensor) -> None:
        """At least one entry more than will be filled: a step writes there what it does not keep."""
        if self.bound + tokens < self.capacity or not kept.numel():
            self.bound += tokens
            return
        self.bound = int((self.count + kept.sum(1)).max())  # waits for the device
        capacity = self.capacity
        while capacity <= self.bound:
            capacity *= 2
        if capacity == self.capacity:
            return
        for name in ("k", "v", "log_weight", "position"):
            held = getattr(self, name)
            more = held.new_zeros(held.shape[0], capacity, *held.shape[2:])
            more[:, : held.shape[1]] = held
            setattr(self, name, more)

    @staticmethod
    def _one_each(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All (n, 0, h), without waiting for the device: a head that does not keep the token writes zeros after its
        last one."""
        n, t, h = torch.meshgrid(*(torch.arange(size, device=keep.device) for size in keep.shape), indexing="ij")
        return n.flatten(), t.flatten(), h.flatten()
