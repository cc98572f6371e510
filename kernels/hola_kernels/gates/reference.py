"""The definition of decay and write strength (Gated DeltaNet, Yang et al. 2024, arXiv 2412.06464; decay as in Mamba2).

    log_decay = -exp(A_log) log(1 + exp(a + dt_bias))        beta = beta_range / (1 + exp(-b))        in float32

beta_range 2 allows negative eigenvalues of the update I - beta k k' (Grazzi et al. 2024, arXiv 2411.12537).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype


def decay_and_strength_reference(x: Tensor, heads: int, A_log_H: Tensor | None,
                                 dt_bias_H: Tensor | None, beta_range: int = 1) -> tuple[Tensor, Tensor]:
    """x [..., W] = b [H], a [H] where there is decay, anything -> log_decay, beta [..., H]; zeros without decay."""
    compute = compute_dtype(x)
    beta = beta_range / (1 + torch.exp(-x[..., :heads].to(compute)))
    if A_log_H is None:
        return torch.zeros_like(beta), beta
    z = x[..., heads: 2 * heads].to(compute) + dt_bias_H.to(compute)
    return -torch.exp(A_log_H.to(compute)) * torch.logaddexp(z, torch.zeros_like(z)), beta
