"""The residuals of the gated delta rule: how far the decayed state is from every token's value.

    e_t = v_t - exp(g_t) S_{t-1}' k^_t      k^ of unit length, S as in `gated_delta_rule`

No gradient: what is chosen by them has none. The states are computed once more here, without outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_state, check_tokens, segments_of
from hola_kernels.gated_delta import triton_refusal
from hola_kernels.gated_delta.torch_chunked import chunk_factors
from hola_kernels.norms import compute_dtype, l2_normalize
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments, documents_of
from hola_kernels.segments import rows_as_segments


@operation
@torch.no_grad()
def gated_delta_residual(*, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
                         cu_seqlens: Tensor | PackedDocuments | None = None, initial_state: Tensor | None = None,
                         backend: str = "auto") -> Tensor:
    """e [B, T, H, V] of every token, without gradient: float32 (float64 in float64 calls), of triton in v's dtype.

    The arguments are those of `gated_delta_rule`, with as many heads in k as in v. Raises KernelError.
    """
    check_tokens(k, k, v, log_decay=log_decay, beta=beta)
    documents = documents_of(k, cu_seqlens)
    bounds = segments_of(k, documents)
    check_state(initial_state, bounds.numel() - 1, k, v)
    name = choose_backend(backend, k.device, triton_refusal(k, k, v))
    flat = [x.flatten(0, 1) for x in (k, v, log_decay, beta)]
    if name == "triton" and v.numel():
        longest = None if documents is None else documents.max_seqlen
        if longest is None:
            bounds = rows_as_segments(*k.shape[:2], torch.device("cpu")) if documents is None else documents.host()
        return _residual_triton(*flat, bounds, initial_state, longest).view_as(v)
    if initial_state is None:
        initial_state = torch.zeros(bounds.numel() - 1, k.shape[2], k.shape[3], v.shape[3], dtype=compute_dtype(v),
                                    device=k.device)
    run = residual_reference if name == "reference" else residual_chunked
    return run(*flat, bounds, initial_state).view_as(v)


def residual_reference(k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor, cu_seqlens: Tensor,
                       state_NHKV: Tensor) -> Tensor:
    """The definition, token by token: e [M, H, V]."""
    compute = compute_dtype(v_MHV)
    k, v, beta = l2_normalize(k_MHK.to(compute)), v_MHV.to(compute), beta_MH.to(compute)
    alpha = log_decay_MH.to(compute).exp()
    bounds, found = cu_seqlens.tolist(), []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = state_NHKV[n].to(compute)
        for t in range(start, end):
            decayed = alpha[t][:, None, None] * state
            found.append(v[t] - torch.einsum("hkv,hk->hv", decayed, k[t]))
            state = decayed + beta[t][:, None, None] * torch.einsum("hk,hv->hkv", k[t], found[-1])
    return torch.stack(found) if found else v


def residual_chunked(k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor, cu_seqlens: Tensor,
                     state_NHKV: Tensor) -> Tensor:
    """Same contract, in chunks: what is retrieved comes from the state before the chunk and from the chunk's writes."""
    compute = compute_dtype(v_MHV)
    factors = chunk_factors(k_MHK, v_MHV, log_decay_MH, beta_MH, cu_seqlens)
    chunks, state = factors.chunks, state_NHKV.to(compute)
    keys_in = factors.keys * factors.g.exp()[..., None]
    earlier = ((factors.keys @ factors.keys.mT) * factors.decay).tril(-1)
    retrieved, order = [], []
    for rows in chunks.blocks_by_index:
        segment = chunks.segment[rows]
        state_in = state[segment]
        x = factors.from_values[rows] - factors.from_keys[rows] @ state_in
        retrieved.append(keys_in[rows] @ state_in + earlier[rows] @ x)
        order.append(rows)
        state = state.index_copy(0, segment, factors.decay_all[rows] * state_in + factors.k_to_end[rows].mT @ x)
    if not order:
        return v_MHV.to(compute)
    back = torch.cat(order).argsort()
    return v_MHV.to(compute) - chunks.unpad(torch.cat(retrieved)[back].transpose(1, 2))


def _residual_triton(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cu_seqlens: Tensor, state: Tensor | None,
                     max_seqlen: int | None) -> Tensor:
    """Two launches of the rule's: the chunks' terms, and the states of the backward pass (more for long sequences)."""
    from hola_kernels.gated_delta.triton_rule import chunk_terms, layout_for
    from hola_kernels.gated_delta.triton_split import entering_states
    from hola_kernels.gated_delta.triton_state_pass import recompute_states

    k, v, log_decay, beta = (x.contiguous() for x in (k, v, log_decay, beta))
    layout = layout_for(k, v, cu_seqlens, max_seqlen=max_seqlen)
    state = None if state is None else state.float().contiguous()
    terms = chunk_terms(k, k, v, log_decay, beta, layout)
    if terms.maps is not None:
        state = entering_states(maps=terms.maps, layout=layout, state_NHKV=state, value_dim=v.shape[2])
    return recompute_states(k_MHK=k, v_MHV=v, scales=terms.scales, solve=terms.solve, layout=layout, state_PHKV=state,
                            precision="tf32x3" if v.dtype == torch.float32 else "tf32")[1]


__all__ = ["gated_delta_residual"]
