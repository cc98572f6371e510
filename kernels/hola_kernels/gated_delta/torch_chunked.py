"""The gated delta rule in chunks (WY form), plain PyTorch: runs anywhere, differentiable.

Inside a chunk of tokens with cumulative log decay g, the residual writes x_i = beta_i e_i
solve a unit lower-triangular system, because each token sees what the earlier ones wrote:

    (I + A) x = beta v - beta exp(g) k S_in,      A_ij = beta_i exp(g_i - g_j) k_i.k_j   (j < i)
    o = K^-1/2 (exp(g) q S_in + tril(q k^T exp(g_i - g_j)) x)
    S_out = exp(g_end) S_in + sum_j exp(g_end - g_j) k_j x_j^T

The row norm of x is the score of the exact cache, so the score costs no second pass.
Only the states are sequential: one small step a chunk, all segments together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype, l2_normalize
from hola_kernels.segments import cut_units

CHUNK = 64


def gated_delta_chunked(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor,
                        cu_seqlens: Tensor, state_NHKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat tokens in segments -> o [M, H, V], score [M, H] (no gradient), state [N, H, K, V]; float32 or float64."""
    wide = compute_dtype(v_MHV)
    units = cut_units(cu_seqlens, CHUNK)

    def chunks(x: Tensor) -> Tensor:  # [M, H, ...] -> [U, H, c, ...]
        return units.pad(x.to(wide)).transpose(1, 2)

    q, k, v = chunks(l2_normalize(q_MHK.to(wide))), chunks(l2_normalize(k_MHK.to(wide))), chunks(v_MHV)
    beta, g = chunks(beta_MH), chunks(log_decay_MH).cumsum(-1)
    q = q * q.shape[-1] ** -0.5

    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    # masked before exp: above the diagonal g_i - g_j is positive and may overflow
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    system = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    in_values = beta[..., None] * v
    in_keys = (beta * g.exp())[..., None] * k
    solved = torch.linalg.solve_triangular(
        system + torch.eye(CHUNK, dtype=wide, device=q.device), torch.cat([in_values, in_keys], -1),
        upper=False, unitriangular=True)
    from_values, from_keys = solved.split([v.shape[-1], k.shape[-1]], -1)
    attention = (q @ k.mT) * decay
    q_decayed = q * g.exp()[..., None]
    k_to_end = k * (g[..., -1:] - g).exp()[..., None]
    decay_all = g[..., -1].exp()[..., None, None]

    state = state_NHKV.to(wide)
    outputs, writes, order = [], [], []
    for rows in units.rows:
        segment = units.segment[rows]
        state_in = state[segment]
        x = from_values[rows] - from_keys[rows] @ state_in
        outputs.append(q_decayed[rows] @ state_in + attention[rows] @ x)
        writes.append(x.detach().norm(dim=-1))
        order.append(rows)
        state = state.index_copy(0, segment, decay_all[rows] * state_in + k_to_end[rows].mT @ x)
    if not order:
        return v_MHV.to(wide), beta_MH.detach().to(wide), state
    back = torch.cat(order).argsort()
    o = torch.cat(outputs)[back].transpose(1, 2)
    score = torch.cat(writes)[back].transpose(1, 2)
    return units.unpad(o), units.unpad(score), state
