"""The definition (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4).

    y = x / sqrt(mean x^2 + eps) * weight       over the last axis, in float32
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x [..., D] -> y [..., D] in x's dtype."""
    compute = compute_dtype(x)
    mean_square = x.to(compute).square().sum(-1, keepdim=True) / x.shape[-1]
    return (x.to(compute) / torch.sqrt(mean_square + eps) * weight_D.to(compute)).to(x.dtype)
