"""The definition of the gated delta rule, token by token (method: "Per token, per head").

    e_t = v_t - alpha_t S_{t-1}^T k_t        S_t = alpha_t S_{t-1} + beta_t k_t e_t^T
    o_t = K^-1/2 S_t^T q_t                   score_t = beta_t |e_t|
with k_t, q_t of unit length. Slow and differentiable; float64 in float64 out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype, l2_normalize


def gated_delta_reference(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor,
                          cu_seqlens: Tensor, state_NHKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `torch_chunked.gated_delta_chunked`."""
    compute = compute_dtype(v_MHV)
    q, k, v = l2_normalize(q_MHK.to(compute)), l2_normalize(k_MHK.to(compute)), v_MHV.to(compute)
    alpha, beta = log_decay_MH.to(compute).exp(), beta_MH.to(compute)
    scale = k.shape[-1] ** -0.5
    outputs, scores, states = [], [], []
    bounds = cu_seqlens.tolist()
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = state_NHKV[n].to(compute)
        for t in range(start, end):
            decayed = alpha[t][:, None, None] * state
            residual = v[t] - torch.einsum("hkv,hk->hv", decayed, k[t])
            state = decayed + beta[t][:, None, None] * torch.einsum("hk,hv->hkv", k[t], residual)
            outputs.append(scale * torch.einsum("hkv,hk->hv", state, q[t]))
            scores.append((beta[t] * residual.norm(dim=-1)).detach())
        states.append(state)
    o_MHV = torch.stack(outputs) if outputs else v
    score_MH = torch.stack(scores) if scores else beta.detach()
    return o_MHV, score_MH, torch.stack(states) if states else state_NHKV.to(compute)
