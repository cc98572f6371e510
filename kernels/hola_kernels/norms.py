"""The two norms of a HOLA layer.

The state path needs unit length (with |k| = sqrt(K) the update's eigenvalue 1 - beta K
diverges); cache attention needs length sqrt(K) so that its softmax can be sharp.
"""

from __future__ import annotations

import torch
from torch import Tensor

L2_EPS = 1e-6  # inside the square root, as flash-linear-attention has it: its checkpoints give our numbers
RMS_EPS = 1e-6


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64; everything narrower is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def l2_normalize(x: Tensor) -> Tensor:
    """x [..., K] -> x / sqrt(sum x^2 + eps), same dtype."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def rms_normalize(x: Tensor, gamma: Tensor) -> Tensor:
    """x [..., K], gamma [K] -> gamma * x / sqrt(mean x^2 + eps), dtype of x."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS) * gamma.to(x.dtype)


def read_normalize(x: Tensor, gamma: Tensor, read_norm: str) -> Tensor:
    """The norm of cache attention: "rms" (sharp, the default), "l2" (flat) or "none"; gamma applies to all."""
    if read_norm == "rms":
        return rms_normalize(x, gamma)
    if read_norm == "none":
        return x * gamma.to(x.dtype)
    return l2_normalize(x) * gamma.to(x.dtype)
