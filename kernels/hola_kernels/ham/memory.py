"""The state of a HAM layer between calls, and the calls that go on from it: it grows with the kept tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.checks import check_tokens, segments_of
from hola_kernels.gated_delta import gated_delta_rule
from hola_kernels.gated_delta.residual import gated_delta_residual
from hola_kernels.gated_delta.step import gated_delta_step
from hola_kernels.ham import check_ham, read_normed, routing_score
from hola_kernels.kept_attention import KeptTokens, kept_attention, kept_attention_step
from hola_kernels.merge import merge_outputs
from hola_kernels.norms import compute_dtype, l2_normalize
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments, documents_of


@dataclass
class HamState:
    """Memory of N sequences: state [N, H, K, V] float32 (float64 in float64 calls), and the kept tokens, keys after
    their norm."""

    state: Tensor
    kept: KeptTokens

    @classmethod
    def empty(cls, sequences: int, heads: int, key_dim: int, value_dim: int, *, dtype: torch.dtype,
              device: torch.device | str) -> HamState:
        """The memory before the first token; dtype: of k and v."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        state = torch.zeros(sequences, heads, key_dim, value_dim, dtype=compute, device=device)
        return cls(state, KeptTokens.empty(sequences, heads, key_dim, value_dim, dtype=dtype, device=device))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by name; the sequences are on axis 0."""
        return {"state": self.state, **self.kept.tensors()}

    def map(self, change: Callable[[Tensor], Tensor]) -> HamState:
        """A memory of change(tensor) for every tensor."""
        return HamState(change(self.state), self.kept.map(change))

    def nbytes(self) -> int:
        """Bytes held, of the room for kept tokens the whole."""
        return self.state.nbytes + self.kept.nbytes()


@operation
@torch.no_grad()
def ham_attention_onward(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, mix: Tensor,
                         gamma_q: Tensor, gamma_k: Tensor, threshold: Tensor, memory: HamState,
                         route: Tensor | None = None, cu_seqlens: Tensor | PackedDocuments | None = None,
                         backend: str = "auto") -> Tensor:
    """o [B, T, H, V] of `ham_attention` for tokens that go on from a memory of their N sequences, which is brought up
    to date."""
    check_tokens(q, k, v, log_decay=log_decay, beta=beta, **({} if route is None else {"route": route}))
    check_ham(q, v, mix, gamma_q, gamma_k, threshold)
    documents = documents_of(q, cu_seqlens)
    rule = {"k": k, "v": v, "log_decay": log_decay, "beta": beta, "cu_seqlens": documents,
            "initial_state": memory.state, "backend": backend}
    residual = None if route is not None else gated_delta_residual(**rule)
    o_state, _, memory.state = gated_delta_rule(q=q, **rule)
    score, log_weight = routing_score(v, residual, route)
    q, k = read_normed(q, k, gamma_q, gamma_k, backend)
    read = {"q": q, "k": k, "v": v, "keep": score >= threshold.to(score.dtype), "log_weight": log_weight}
    if documents is None:
        o_exact = kept_attention(**read, state=memory.kept, backend=backend)
    else:
        o_exact = _read_in_rows(read, segments_of(q, documents), memory.kept, backend)
    return merge_outputs(o_state, o_exact, mix, "two", backend)


def _read_in_rows(read: dict[str, Tensor | None], bounds: Tensor, kept: KeptTokens, backend: str) -> Tensor:
    """o [1, M, H, V] of sequences of unequal lengths: each in a row of the longest, whose other tokens are not kept."""
    lengths = bounds.diff()
    longest, total = int(lengths.max()), read["v"].shape[1]  # waits for the device
    if not total:
        return read["v"].clone()
    row = torch.repeat_interleave(torch.arange(lengths.numel(), device=bounds.device), lengths)
    index = row * longest + torch.arange(total, device=bounds.device) - bounds[row]

    def spread(x: Tensor) -> Tensor:
        rows = x.new_zeros(lengths.numel() * longest, *x.shape[2:])
        return rows.index_copy(0, index, x[0]).view(-1, longest, *x.shape[2:])

    o = kept_attention(**{name: None if x is None else spread(x) for name, x in read.items()}, state=kept,
                       backend=backend)
    kept.length += lengths - longest
    return o.flatten(0, 1)[index][None]


@operation
@torch.no_grad()
def ham_attention_step(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, mix: Tensor,
                       gamma_q: Tensor, gamma_k: Tensor, threshold: Tensor, memory: HamState,
                       route: Tensor | None = None, backend: str = "auto") -> Tensor:
    """One token for each of N sequences; `memory` is updated in place.

    q, k [N, H, K], v [N, H, V], log_decay, beta, route [N, H], mix [N, H, 2]. Waits for the device only where the room
    for kept tokens must grow. Returns o [N, H, V] in v's dtype.
    """
    check_ham(q, v, mix, gamma_q, gamma_k, threshold)
    residual = None
    if route is None:
        compute = compute_dtype(v)
        decayed = log_decay.to(compute).exp()[..., None, None] * memory.state
        residual = v.to(compute) - (decayed * l2_normalize(k.to(compute))[..., None]).sum(-2)
    o_state, _ = gated_delta_step(q=q, k=k, v=v, log_decay=log_decay, beta=beta, state=memory.state, backend=backend)
    score, log_weight = routing_score(v, residual, route)
    q, k = read_normed(q, k, gamma_q, gamma_k, backend)
    o_exact = kept_attention_step(q=q, k=k, v=v, keep=score >= threshold.to(score.dtype), log_weight=log_weight,
                                  state=memory.kept, backend=backend)
    return merge_outputs(o_state, o_exact, mix, "two", backend)


__all__ = ["HamState", "ham_attention_onward", "ham_attention_step"]
