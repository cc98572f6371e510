"""Hybrid associative memory (HAM, arXiv 2603.22325): a state that sees every token, and exact tokens where it fails.

    o_state = K^-1/2 S_t' q^_t                                  Gated DeltaNet, `gated_delta_rule`
    r_t     = 1 - cos(v_t, exp(g_t) S_{t-1}' k^_t)              cosine routing score: how wrong the state's answer is
            or sigmoid(f(x_t))                                  learned routing score, `learned_logit` of `controller`
    kept_t  = r_t >= tau                                        a head keeps the token for all later ones
    o_exact = softmax over the kept tokens before t and t itself of (q~_t . k~_j / sqrt(K) + w_j) applied to v
    o       = sigmoid(m_1) o_state + sigmoid(m_2) o_exact       two independent gates a head

q^, k^ have unit length; q~, k~ are q and k after an RMS norm with learned gains. w_j is log r_j of a learned score for
j < t, which gives the router an exact gradient, and 0 of a cosine score, which has none. tau is moved outside
(`kept_attention.controller`). Published are the state, the threshold, the two gates and both scores; norms, the gains,
w_j and the exact forms of the scores are choices of ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_floating, check_tokens, check_vectors
from hola_kernels.errors import KernelError
from hola_kernels.gated_delta import gated_delta_rule
from hola_kernels.gated_delta.residual import gated_delta_residual
from hola_kernels.kept_attention import kept_attention
from hola_kernels.kept_attention.controller import cosine_score
from hola_kernels.merge import merge_outputs
from hola_kernels.norms import RMS_EPS, compute_dtype, rms_normalize
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments, check_max_seqlen, documents_of


@operation
def ham_attention(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, mix: Tensor, gamma_q: Tensor,
                  gamma_k: Tensor, threshold: Tensor, route: Tensor | None = None,
                  cu_seqlens: Tensor | PackedDocuments | None = None, max_seqlen: int | None = None,
                  backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """A HAM layer between its projections and its output norm.

    Args:
        q, k: [B, T, H, K], v [B, T, H, V]: after the short convolutions.
        log_decay, beta: [B, T, H], as in `gated_delta_rule`.
        mix: [B, T, H, 2], what the gates' sigmoids take: of the state, of the exact tokens.
        gamma_q, gamma_k: [K], gains of the norms of q and k in the exact read.
        threshold: tau, [1].
        route: [B, T, H], logits of a learned routing score; None: the cosine score.
        cu_seqlens: [N + 1], N documents in one row (B = 1); they do not see each other.
        max_seqlen, backend: see `hola_attention`.

    Returns:
        o [B, T, H, V] in v's dtype, keep [B, T, H] bool, and the score [B, T, H], float32 (float64), without gradient.

    Raises:
        KernelError: tensors that do not fit together.
    """
    check_tokens(q, k, v, log_decay=log_decay, beta=beta, **({} if route is None else {"route": route}))
    check_ham(q, v, mix, gamma_q, gamma_k, threshold)
    check_max_seqlen(max_seqlen, cu_seqlens)
    documents = documents_of(q, cu_seqlens, max_seqlen=max_seqlen)
    rule = {"k": k, "v": v, "log_decay": log_decay, "beta": beta, "cu_seqlens": documents, "backend": backend}
    o_state, _, _ = gated_delta_rule(q=q, **rule, max_seqlen=max_seqlen)
    score, log_weight = routing_score(v, None if route is not None else gated_delta_residual(**rule), route)
    keep = score >= threshold.to(score.dtype)
    q, k = read_normed(q, k, gamma_q, gamma_k, backend)
    o_exact = kept_attention(q=q, k=k, v=v, keep=keep, log_weight=log_weight, cu_seqlens=documents, backend=backend)
    return merge_outputs(o_state, o_exact, mix, "two", backend), keep, score


def routing_score(v: Tensor, residual: Tensor | None, route: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(score without gradient, log weights of kept tokens or None) of v [..., H, V] and its residual, or of logits
    [..., H]."""
    if route is None:
        return cosine_score(v.detach(), v.detach() - residual), None
    logit = route.to(torch.float64 if route.dtype == torch.float64 else torch.float32)
    return logit.detach().sigmoid(), F.logsigmoid(logit)


def read_normed(q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """q and k as the exact read takes them."""
    compute = compute_dtype(q)
    refusal = "RMS norm does not take float64" if compute == torch.float64 else None
    if choose_backend(backend, q.device, refusal) == "triton":
        return _read_normed_triton(q, gamma_q), _read_normed_triton(k, gamma_k)
    return tuple(rms_normalize(x.to(compute), gamma).to(x.dtype) for x, gamma in ((q, gamma_q), (k, gamma_k)))


def _read_normed_triton(x: Tensor, gamma: Tensor) -> Tensor:
    from hola_kernels.rms_norm import rms_norm  # not part of exported models

    return rms_norm(x=x, weight=gamma, eps=RMS_EPS, backend="triton")


def check_ham(q: Tensor, v: Tensor, mix: Tensor, gamma_q: Tensor, gamma_k: Tensor, threshold: Tensor) -> None:
    """KernelError for what does not fit; q [..., H, K], v [..., H, V]."""
    check_floating(mix=mix)
    check_vectors(gamma_q=(gamma_q, q.shape[-1]), gamma_k=(gamma_k, q.shape[-1]), threshold=(threshold, 1))
    if mix.shape != (*v.shape[:-1], 2):
        raise KernelError(f"mix {tuple(mix.shape)} must be {(*v.shape[:-1], 2)}: two numbers a token and head")


__all__ = ["ham_attention"]
