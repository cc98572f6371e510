"""The definition of decay and write strength (Gated DeltaNet, Yang et al. 2024, arXiv 2412.06464; decay as in Mamba2).

    log_decay = -exp(A_log) log(1 + exp(a + dt_bias))        beta = 1 / (1 + exp(-b))        in float32
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype


def decay_and_strength_reference(x: Tensor, heads: int, A_log_H: Tensor | None,
                                 dt_bias_H: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [..., W] = b [H], a [H] where there is decay, anything -> log_decay, beta [..., H]; zeros without decay."""
    wide = compute_dtype(x)
    beta = 1 / (1 + torch.exp(-x[..., :heads].to(wide)))
    if A_log_H is None:
        return torch.zeros_like(beta), beta
    z = x[..., heads: 2 * heads].to(wide) + dt_bias_H.to(wide)
    return -torch.exp(A_log_H.to(wide)) * torch.logaddexp(z, torch.zeros_like(z)), beta
