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

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype, l2_normalize
from hola_kernels.segments import Units, cut_units

CHUNK = 64


@dataclass(frozen=True)
class Factors:
    """What every chunk does to the state that enters it: x = from_values - from_keys S, and S to the end of it.

    Shapes of U chunks with c tokens: keys, from_keys, k_to_end [U, H, c, K]; from_values [U, H, c, V];
    g [U, H, c] cumulative log decay; decay [U, H, c, c] = exp(g_i - g_j) on and below the diagonal;
    decay_all [U, H, 1, 1].
    """

    units: Units
    keys: Tensor
    g: Tensor
    decay: Tensor
    from_values: Tensor
    from_keys: Tensor
    k_to_end: Tensor
    decay_all: Tensor

    def attend(self, q_MHK: Tensor) -> tuple[Tensor, Tensor]:
        """The queries' side: q against the state entering a chunk [U, H, c, K], and within it [U, H, c, c]."""
        q = pad_chunks(self.units, l2_normalize(q_MHK.to(self.keys.dtype)))
        q = q * q.shape[-1] ** -0.5
        return q * self.g.exp()[..., None], (q @ self.keys.mT) * self.decay


def pad_chunks(units: Units, x: Tensor) -> Tensor:
    """[M, H, ...] -> [U, H, c, ...]."""
    return units.pad(x).transpose(1, 2)


def chunk_factors(k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor, cu_seqlens: Tensor) -> Factors:
    """Solve every chunk's system; differentiable. v may have no columns where only `from_keys` is wanted."""
    wide = compute_dtype(k_MHK)
    units = cut_units(cu_seqlens, CHUNK)
    k, v = pad_chunks(units, l2_normalize(k_MHK.to(wide))), pad_chunks(units, v_MHV.to(wide))
    beta, g = pad_chunks(units, beta_MH.to(wide)), pad_chunks(units, log_decay_MH.to(wide)).cumsum(-1)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=k.device).tril()
    # masked before exp: above the diagonal g_i - g_j is positive and may overflow
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    system = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    in_values = beta[..., None] * v
    in_keys = (beta * g.exp())[..., None] * k
    solved = torch.linalg.solve_triangular(
        system + torch.eye(CHUNK, dtype=wide, device=k.device), torch.cat([in_values, in_keys], -1),
        upper=False, unitriangular=True)
    from_values, from_keys = solved.split([v.shape[-1], k.shape[-1]], -1)
    k_to_end = k * (g[..., -1:] - g).exp()[..., None]
    return Factors(units, k, g, decay, from_values, from_keys, k_to_end, g[..., -1].exp()[..., None, None])


def gated_delta_chunked(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor,
                        cu_seqlens: Tensor, state_NHKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat tokens in segments -> o [M, H, V], score [M, H] (no gradient), state [N, H, K, V]; float32 or float64."""
    wide = compute_dtype(v_MHV)
    factors = chunk_factors(k_MHK, v_MHV, log_decay_MH, beta_MH, cu_seqlens)
    units = factors.units
    q_decayed, attention = factors.attend(q_MHK)
    state = state_NHKV.to(wide)
    outputs, writes, order = [], [], []
    for rows in units.rows:
        segment = units.segment[rows]
        state_in = state[segment]
        x = factors.from_values[rows] - factors.from_keys[rows] @ state_in
        outputs.append(q_decayed[rows] @ state_in + attention[rows] @ x)
        writes.append(x.detach().norm(dim=-1))
        order.append(rows)
        state = state.index_copy(0, segment, factors.decay_all[rows] * state_in + factors.k_to_end[rows].mT @ x)
    if not order:
        return v_MHV.to(wide), beta_MH.detach().to(wide), state
    back = torch.cat(order).argsort()
    o = torch.cat(outputs)[back].transpose(1, 2)
    score = torch.cat(writes)[back].transpose(1, 2)
    return units.unpad(o), units.unpad(score), state
