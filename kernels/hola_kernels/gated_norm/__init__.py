"""Gated RMS norm: what the output of every head passes before the output projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_eps, check_floating
from hola_kernels.errors import KernelError
from hola_kernels.gated_norm.reference import gated_rms_norm_reference
from hola_kernels.norms import compute_dtype
from hola_kernels.operation import operation


def gated_rms_norm_fused(x_MV: Tensor, gate_MV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
    """Same contract as `gated_rms_norm_reference`, with torch's own fused pieces."""
    compute = compute_dtype(x_MV)
    normed = F.rms_norm(x_MV.to(compute), weight_V.shape, weight_V.to(compute), eps)
    return (normed * F.silu(gate_MV.to(compute))).to(x_MV.dtype)


def _gated_rms_norm_triton(*arguments: Any) -> Tensor:
    from hola_kernels.gated_norm.triton_rows import gated_rms_norm_triton  # on first use: triton may be missing

    return gated_rms_norm_triton(*arguments)


IMPLEMENTATIONS = {"reference": gated_rms_norm_reference, "torch": gated_rms_norm_fused,
                   "triton": _gated_rms_norm_triton}


@operation
def gated_rms_norm(*, x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5,
                   dgate_buffer: Callable[[], Tensor] | None = None, backend: str = "auto") -> Tensor:
    """RMSNorm(x) * weight * SiLU(gate) over the last axis; statistics in float32.

    x, gate [..., V], weight [V]. dgate_buffer: called in the backward pass, gives memory like gate where the Triton
    backend may leave gate's gradient. Returns y [..., V] in x's dtype. Raises KernelError.
    """
    check_floating(x=x, gate=gate, weight=weight)
    check_eps(eps)
    if not x.ndim or not x.shape[-1]:
        raise KernelError(f"x {tuple(x.shape)} must be [..., V] with V of at least 1")
    if x.shape != gate.shape:
        raise KernelError(f"x {tuple(x.shape)} and gate {tuple(gate.shape)} must have the same shape")
    if weight.shape != x.shape[-1:]:
        raise KernelError(f"weight {tuple(weight.shape)} must be [V] with the V of x {tuple(x.shape)}")
    refusal = f"gated norm takes at most 4096 columns, not {x.shape[-1]}" if x.shape[-1] > 4096 else None
    if torch.float64 in (x.dtype, gate.dtype, weight.dtype):
        refusal = "gated norm does not take float64"
    name = choose_backend(backend, x.device, refusal)
    if name == "triton" and x.numel():
        return IMPLEMENTATIONS[name](x, gate, weight, eps, dgate_buffer)
    run = IMPLEMENTATIONS["torch" if name == "triton" else name]
    return run(x.reshape(-1, x.shape[-1]), gate.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


__all__ = ["gated_rms_norm"]
