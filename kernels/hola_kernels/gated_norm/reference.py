"""The definition of the gated output norm.

    y = x / sqrt(mean x^2 + eps) * weight * SiLU(gate)       over the last axis, statistics in float32
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype


def gated_rms_norm_reference(x_MV: Tensor, gate_MV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
    """Rows x, gate [M, V] -> y [M, V] in x's dtype."""
    compute = compute_dtype(x_MV)
    x, gate = x_MV.to(compute), gate_MV.to(compute)
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    y = x / torch.sqrt(mean_square + eps) * weight_V.to(compute) * (gate / (1 + torch.exp(-gate)))
    return y.to(x_MV.dtype)
