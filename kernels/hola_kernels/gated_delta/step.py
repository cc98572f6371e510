"""The gated delta rule for one token: what decoding repeats."""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype, l2_normalize


@torch.no_grad()
def gated_delta_step(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
                     state: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each of N sequences; `state` [N, H, K, V] is updated in place.

    q, k [N, H, K], v [N, H, V], log_decay, beta [N, H]. Returns o [N, H, V] and the score [N, H]
    (beta * |residual|), both float32 (float64 in float64 calls).
    """
    wide = compute_dtype(v)
    unit_q, unit_k, beta = l2_normalize(q.to(wide)), l2_normalize(k.to(wide)), beta.to(wide)
    decayed = log_decay.to(wide).exp()[..., None, None] * state
    residual = v.to(wide) - (decayed * unit_k[..., None]).sum(-2)
    state.copy_(decayed + (beta[..., None] * unit_k)[..., None] * residual[..., None, :])
    return (state * unit_q[..., None]).sum(-2) * q.shape[-1] ** -0.5, beta * residual.norm(dim=-1)
