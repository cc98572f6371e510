"""Several writes of the delta rule a token (DeltaProduct, Siems et al. 2025, arXiv 2502.10297).

    S' = exp(g_t) S_{t-1}
    S' <- S' + beta_{t,i} k^_{t,i} (v_{t,i} - S'' k^_{t,i})'        i = 1 .. n, one after the other (S'' = S' before it)
    S_t = S'        o_t = K^-1/2 S_t' q^_t

No kernel of its own: a row of n times the length, in which the decay comes with a token's first write and the query
with its last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.checks import check_floating
from hola_kernels.errors import KernelError
from hola_kernels.gated_delta import gated_delta_rule
from hola_kernels.gated_delta.step import gated_delta_step
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments, check_max_seqlen, documents_of
from hola_kernels.state_delay import stretched_documents


@operation
def gated_delta_product(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
                        cu_seqlens: Tensor | PackedDocuments | None = None, max_seqlen: int | None = None,
                        initial_state: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` with n writes a token.

    Args:
        q: [B, T, H, K]; k [B, T, n, H, K], v [B, T, n, H, V] of the writes, first to last.
        log_decay: [B, T, H]; beta [B, T, n, H].
        cu_seqlens, max_seqlen, initial_state, backend: as in `gated_delta_rule`, counted in tokens.

    Returns:
        o [B, T, H, V] in v's dtype, and the state after the last token [N, H, K, V].

    Raises:
        KernelError: tensors that do not fit together.
    """
    _check(q, k, v, log_decay, beta)
    check_max_seqlen(max_seqlen, cu_seqlens)
    documents, writes = documents_of(q, cu_seqlens, max_seqlen=max_seqlen), k.shape[2]
    stretched, longest = stretched_documents(documents, q.device, max_seqlen, writes)
    o, _, state = gated_delta_rule(
        q=_at_last(q, writes), k=k.flatten(1, 2), v=v.flatten(1, 2), log_decay=_at_first(log_decay, writes),
        beta=beta.flatten(1, 2), cu_seqlens=stretched, max_seqlen=longest, initial_state=initial_state, backend=backend)
    return o.unflatten(1, (-1, writes))[:, :, -1], state


@operation
@torch.no_grad()
def gated_delta_product_step(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor,
                             backend: str = "auto") -> Tensor:
    """One token for each of N sequences; `state` [N, H, K, V] is updated in place.

    q [N, H, K], k [N, n, H, K], v [N, n, H, V], log_decay [N, H], beta [N, n, H]. Returns o [N, H, V], float32
    (float64 in float64 calls). Raises KernelError.
    """
    _check(*(x[:, None] for x in (q, k, v, log_decay, beta)))
    nothing = torch.zeros_like(log_decay)
    for write in range(k.shape[1]):
        o, _ = gated_delta_step(q=q, k=k[:, write], v=v[:, write], log_decay=nothing if write else log_decay,
                                beta=beta[:, write], state=state, backend=backend)
    return o


def _at_last(x: Tensor, writes: int) -> Tensor:
    """x [B, T, ...] in a row of B, n T: with the last write of its token, zero with the others."""
    rest = x.new_zeros(*x.shape[:2], writes - 1, *x.shape[2:])
    return torch.cat([rest, x[:, :, None]], 2).flatten(1, 2)


def _at_first(x: Tensor, writes: int) -> Tensor:
    """x [B, T, ...] in a row of B, n T: with the first write of its token, zero with the others."""
    rest = x.new_zeros(*x.shape[:2], writes - 1, *x.shape[2:])
    return torch.cat([x[:, :, None], rest], 2).flatten(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> None:
    check_floating(q=q, k=k, v=v, log_decay=log_decay, beta=beta)
    if k.ndim != 5 or not k.shape[2] or q.shape != (*k.shape[:2], *k.shape[3:]):
        raise KernelError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be [B, T, H, K] and [B, T, n, H, K], n of "
                          "at least 1")
    if v.shape[:-1] != k.shape[:-1]:
        raise KernelError(f"v {tuple(v.shape)} must be [B, T, n, H, V] with the B, T, n, H of k {tuple(k.shape)}")
    for name, x, shape in (("log_decay", log_decay, q.shape[:3]), ("beta", beta, k.shape[:4])):
        if x.shape != shape:
            raise KernelError(f"{name} {tuple(x.shape)} must be {list(shape)}")


__all__ = ["gated_delta_product", "gated_delta_product_step"]
