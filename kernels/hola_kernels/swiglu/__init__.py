"""SwiGLU: what the gate and up projections of an MLP pass before the down projection.

For training only, so the package does not name it at its top: what it names travels with exported models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_floating
from hola_kernels.errors import KernelError
from hola_kernels.norms import compute_dtype
from hola_kernels.operation import operation
from hola_kernels.swiglu.reference import swiglu_reference


def swiglu_chunks(x_M2F: Tensor) -> Tensor:
    """Same contract as `swiglu_reference`, with torch's own SiLU."""
    gate, up = x_M2F.to(compute_dtype(x_M2F)).chunk(2, -1)
    return (F.silu(gate) * up).to(x_M2F.dtype)


def _swiglu_triton(x_M2F: Tensor) -> Tensor:
    from hola_kernels.swiglu.triton_rows import swiglu_triton  # on first use: triton may be missing

    return swiglu_triton(x_M2F)


IMPLEMENTATIONS = {"reference": swiglu_reference, "torch": swiglu_chunks, "triton": _swiglu_triton}


@operation
def swiglu(*, x: Tensor, backend: str = "auto") -> Tensor:
    """SiLU(gate) * up, where x [..., 2F] holds the F numbers of gate before the F of up; computed in float32.

    Returns y [..., F] in x's dtype (float64 is computed in float64, not by triton). Raises KernelError.
    """
    check_floating(x=x)
    if not x.ndim or x.shape[-1] % 2 or not x.shape[-1]:
        raise KernelError(f"x {tuple(x.shape)} of {x.dtype} must be floating-point numbers [..., 2F]: gate and up")
    refusal = "SwiGLU does not take float64" if x.dtype == torch.float64 else None
    run = IMPLEMENTATIONS[choose_backend(backend, x.device, refusal)]
    width = x.shape[-1] // 2
    if not x.numel():
        return x[..., :width] * x[..., width:]
    return run(x.reshape(-1, 2 * width)).view(*x.shape[:-1], width)


__all__ = ["swiglu"]
