"""The gated delta rule in chunks (WY form), plain PyTorch: runs anywhere, differentiable.

Inside a chunk of tokens with cumulative log decay g, the residual writes x_i = beta_i e_i
solve a unit lower-triangular system, because each token sees what the earlier ones wrote:

    (I + A) x = beta v - beta exp(g) k S_in,      A_ij = beta_i exp(g_i - g_j) k_i.k_j   (j < i)
    o = K^-1/2 (exp(g) q S_in + tril(q k^T exp(g_i - g_j)) x)
    S_out = exp(g_end) S_in + sum_j exp(g_end - g_j) k_j x_j^T

Where a token forgets much, differences of g would lose their digits: `cumulative_decay` keeps g in two parts there.

The row norm of x is the score of the exact cache, so the score costs no second pass.
Only the states are sequential: one small step a chunk, all segments together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype, l2_normalize
from hola_kernels.segments import PaddedBlocks, cut_blocks

CHUNK = 64
# exp of it is zero in float32 (below -103.97) and in float64 (below -745.13), as of everything below it: to take it
# instead changes no number
FORGOTTEN = -1000.0
# A chunk whose log decays add up to less has its g in two parts. Above it g is off by some 1e-6 at most: sums of 64
# numbers in float32, whose last digits are 1.9e-6 between 16 and 32.
HARD = -32.0
GRID = 64.0  # its first part are multiples of 1 / GRID: 64 numbers of up to -FORGOTTEN add up without rounding


@dataclass(frozen=True)
class Factors:
    """What every chunk does to the state that enters it: x = from_values - from_keys S, and S to the end of it.

    Shapes of U chunks with c tokens: keys, from_keys, k_to_end [U, H, c, K]; from_values [U, H, c, V];
    g [U, H, c] cumulative log decay (of two parts the sum); decay [U, H, c, c] = exp(g_i - g_j) on and below the
    diagonal; decay_all [U, H, 1, 1].
    """

    chunks: PaddedBlocks
    keys: Tensor
    g: Tensor
    decay: Tensor
    from_values: Tensor
    from_keys: Tensor
    k_to_end: Tensor
    decay_all: Tensor

    def attend(self, q_MHK: Tensor) -> tuple[Tensor, Tensor]:
        """The queries' side: q against the state entering a chunk [U, H, c, K], and within it [U, H, c, c]."""
        q = pad_chunks(self.chunks, l2_normalize(q_MHK.to(self.keys.dtype)))
        q = q * q.shape[-1] ** -0.5
        return q * self.g.exp()[..., None], (q @ self.keys.mT) * self.decay


def pad_chunks(chunks: PaddedBlocks, x: Tensor) -> Tensor:
    """[M, H, ...] -> [U, H, c, ...]."""
    return chunks.pad(x).transpose(1, 2)


def cumulative_decay(log_decay_UHc: Tensor) -> tuple[Tensor, Tensor]:
    """(g, low) [U, H, c]: sums of the log decays from a chunk's first token, and what rounding took from g.

    (g_i - g_j) + (low_i - low_j) is the log decay from token j to token i with an error of 1e-6, whatever lies before
    them: after a token of -1e9, and after -inf. Where a chunk's decays are not HARD, g is the plain sum and low zero.
    """
    clamped = torch.where(log_decay_UHc < FORGOTTEN, FORGOTTEN, log_decay_UHc)
    # a decay of zero has no slope, and must not inherit the rounding of its neighbours' sums
    clamped = torch.where(clamped.detach().exp() == 0, clamped.detach(), clamped)
    plain = clamped.cumsum(-1)
    coarse = (clamped.detach() * GRID).round() / GRID
    high, fine = coarse.cumsum(-1), (clamped - coarse).cumsum(-1)
    total = high + fine
    low = (high - total.detach()) + fine.detach()
    hard = (plain.detach().amin(-1, keepdim=True) < HARD)
    return torch.where(hard, total, plain), torch.where(hard, low, 0.0)


def chunk_factors(k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor, cu_seqlens: Tensor) -> Factors:
    """Solve every chunk's system; differentiable. v may have no columns where only `from_keys` is wanted."""
    compute = compute_dtype(k_MHK)
    chunks = cut_blocks(cu_seqlens, CHUNK)
    k, v = pad_chunks(chunks, l2_normalize(k_MHK.to(compute))), pad_chunks(chunks, v_MHV.to(compute))
    beta = pad_chunks(chunks, beta_MH.to(compute))
    g, low = cumulative_decay(pad_chunks(chunks, log_decay_MH.to(compute)))
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=k.device).tril()
    # masked before exp: above the diagonal g_i - g_j is positive and may overflow
    between = (g[..., :, None] - g[..., None, :]) + (low[..., :, None] - low[..., None, :])
    decay = between.masked_fill(~causal, -torch.inf).exp()
    system = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    in_values = beta[..., None] * v
    in_keys = (beta * g.exp())[..., None] * k
    solved = torch.linalg.solve_triangular(
        system + torch.eye(CHUNK, dtype=compute, device=k.device), torch.cat([in_values, in_keys], -1),
        upper=False, unitriangular=True)
    from_values, from_keys = solved.split([v.shape[-1], k.shape[-1]], -1)
    k_to_end = k * ((g[..., -1:] - g) + (low[..., -1:] - low)).exp()[..., None]
    return Factors(chunks, k, g, decay, from_values, from_keys, k_to_end, g[..., -1].exp()[..., None, None])


def gated_delta_chunked(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor,
                        cu_seqlens: Tensor, state_NHKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat tokens in segments -> o [M, H, V], score [M, H] (no gradient), state [N, H, K, V]; float32 or float64."""
    compute = compute_dtype(v_MHV)
    factors = chunk_factors(k_MHK, v_MHV, log_decay_MH, beta_MH, cu_seqlens)
    chunks = factors.chunks
    q_decayed, attention = factors.attend(q_MHK)
    state = state_NHKV.to(compute)
    outputs, writes, order = [], [], []
    for rows in chunks.blocks_by_index:
        segment = chunks.segment[rows]
        state_in = state[segment]
        x = factors.from_values[rows] - factors.from_keys[rows] @ state_in
        outputs.append(q_decayed[rows] @ state_in + attention[rows] @ x)
        writes.append(x.detach().norm(dim=-1))
        order.append(rows)
        state = state.index_copy(0, segment, factors.decay_all[rows] * state_in + factors.k_to_end[rows].mT @ x)
    if not order:
        return v_MHV.to(compute), beta_MH.detach().to(compute), state
    back = torch.cat(order).argsort()
    o = torch.cat(outputs)[back].transpose(1, 2)
    score = torch.cat(writes)[back].transpose(1, 2)
    return chunks.unpad(o), chunks.unpad(score), state
