"""RMS norm of a token's whole width: what a layer does to the residual stream before its mixer and before its MLP.

The stream goes on beside the normed copy, so in the backward pass two gradients meet at x. `rms_norm_with_residual`
returns the stream as well: its gradient then comes through the norm's backward pass, which adds it as it writes dx,
instead of through a kernel of its own that reads two and writes one.
For training only, so the package does not name it at its top: what it names travels with exported models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_eps, check_floating
from hola_kernels.errors import KernelError
from hola_kernels.norms import compute_dtype
from hola_kernels.operation import operation
from hola_kernels.rms_norm.reference import rms_norm_reference

MOST_COLUMNS = 16384  # of the Triton kernels: a row lies in the registers of one program


def rms_norm_torch(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Same contract as `rms_norm_reference`, with torch's own function: its bits where x and weight have one dtype."""
    if x.dtype == weight_D.dtype:
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    compute = compute_dtype(x)
    return F.rms_norm(x.to(compute), weight_D.shape, weight_D.to(compute), eps).to(x.dtype)


def rms_norm(*, x: Tensor, weight: Tensor, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last axis, computed in float32.

    x [..., D], weight [D] of any floating dtype. Returns y [..., D] in x's dtype (float64 is computed in float64,
    not by triton). Raises KernelError.
    """
    return rms_norm_with_residual(x=x, weight=weight, eps=eps, backend=backend)[0]


@operation
def rms_norm_with_residual(*, x: Tensor, weight: Tensor, eps: float = 1e-5,
                           backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(`rms_norm` of x, x itself): go on with this x, and one backward kernel adds its gradient to the norm's.

    Nothing is copied: the second is x or a view of it, not to be written to. Raises KernelError.
    """
    check_floating(x=x, weight=weight)
    check_eps(eps)
    if not x.ndim or not x.shape[-1] or weight.shape != x.shape[-1:]:
        raise KernelError(f"weight {tuple(weight.shape)} must be [D] with the D of x {tuple(x.shape)}")
    refusal = None
    if x.shape[-1] > MOST_COLUMNS:
        refusal = f"RMS norm takes at most {MOST_COLUMNS} columns, not {x.shape[-1]}"
    if torch.float64 in (x.dtype, weight.dtype):
        refusal = "RMS norm does not take float64"
    name = choose_backend(backend, x.device, refusal)
    if name == "triton" and x.numel():
        from hola_kernels.rms_norm.triton_rows import rms_norm_triton  # on first use: triton may be missing

        return rms_norm_triton(x, weight, eps)
    run = rms_norm_reference if name == "reference" else rms_norm_torch
    return run(x, weight, eps), x


__all__ = ["rms_norm", "rms_norm_with_residual"]
