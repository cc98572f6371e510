"""Gated delta rule with scores: the compressed memory of a HOLA layer."""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_tokens, segments_of
from hola_kernels.gated_delta.reference import gated_delta_reference
from hola_kernels.gated_delta.torch_chunked import gated_delta_chunked
from hola_kernels.norms import compute_dtype

IMPLEMENTATIONS = {"reference": gated_delta_reference, "torch": gated_delta_chunked}


def gated_delta_rule(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
                     cu_seqlens: Tensor | None = None, initial_state: Tensor | None = None,
                     backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """o_t = K^-1/2 S_t^T q_t of the gated delta rule, and the score of every token.

    q, k [B, T, H, K] and v [B, T, H, V] in one dtype (q and k are brought to unit length here),
    log_decay [B, T, H] <= 0, beta [B, T, H] in (0, 1). With cu_seqlens [N + 1], B is 1 and the
    tokens are N documents that do not see each other. initial_state [N, H, K, V] (N = B without
    cu_seqlens).

    Returns o [B, T, H, V] in v's dtype, score [B, T, H] (beta * |residual|, no gradient) and the
    final state [N, H, K, V], both float32 (float64 in float64 calls). Raises KernelError.
    """
    check_tokens(q, k, v, log_decay, beta, cu_seqlens)
    cuts = segments_of(q, cu_seqlens)
    wide = compute_dtype(v)
    if initial_state is None:
        initial_state = torch.zeros(cuts.numel() - 1, q.shape[2], k.shape[3], v.shape[3], dtype=wide, device=q.device)
    run = IMPLEMENTATIONS[choose_backend(backend, q.device)]
    o, score, state = run(*(x.flatten(0, 1) for x in (q, k, v, log_decay, beta)), cuts, initial_state)
    return o.view_as(v).to(v.dtype), score.view_as(beta), state


__all__ = ["gated_delta_rule"]
