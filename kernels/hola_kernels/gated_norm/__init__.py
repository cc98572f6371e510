"""Gated RMS norm: what the output of every head passes before the output projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.errors import KernelError
from hola_kernels.gated_norm.reference import gated_rms_norm_reference
from hola_kernels.norms import compute_dtype


def gated_rms_norm_fused(x_MV: Tensor, gate_MV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
    """Same contract as `gated_rms_norm_reference`, with torch's own fused pieces."""
    wide = compute_dtype(x_MV)
    normed = F.rms_norm(x_MV.to(wide), weight_V.shape, weight_V.to(wide), eps)
    return (normed * F.silu(gate_MV.to(wide))).to(x_MV.dtype)


def _gated_rms_norm_triton(*arguments: Any) -> Tensor:
    from hola_kernels.gated_norm.triton_rows import gated_rms_norm_triton  # on first use: triton may be missing

    return gated_rms_norm_triton(*arguments)


IMPLEMENTATIONS = {"reference": gated_rms_norm_reference, "torch": gated_rms_norm_fused,
                   "triton": _gated_rms_norm_triton}


def gated_rms_norm(*, x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5,
                   dgate_room: Callable[[], Tensor] | None = None, backend: str = "auto") -> Tensor:
    """RMSNorm(x) * weight * SiLU(gate) over the last axis; statistics in float32.

    x, gate [..., V], weight [V]. dgate_room: gives, when the backward pass asks, memory like gate where the Triton
    backend may leave gate's gradient. Returns y [..., V] in x's dtype. Raises KernelError.
    """
    if x.shape != gate.shape:
        raise KernelError(f"x {tuple(x.shape)} and gate {tuple(gate.shape)} must have the same shape")
    if weight.shape != x.shape[-1:]:
        raise KernelError(f"weight {tuple(weight.shape)} must be [V] with the V of x {tuple(x.shape)}")
    refusal = f"gated norm takes at most 4096 columns, not {x.shape[-1]}" if x.shape[-1] > 4096 else None
    if x.dtype == torch.float64:
        refusal = "gated norm does not take float64"
    name = choose_backend(backend, x.device, refusal)
    if name == "triton":
        return IMPLEMENTATIONS[name](x, gate, weight, eps, dgate_room)
    run = IMPLEMENTATIONS[name]
    return run(x.reshape(-1, x.shape[-1]), gate.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


__all__ = ["gated_rms_norm"]
