"""Decay and write strength: two numbers a token and head, straight from their columns of the fused projection.

For training only, so the package does not name it at its top: what it names travels with exported models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_floating
from hola_kernels.errors import KernelError
from hola_kernels.gates.reference import decay_and_strength_reference
from hola_kernels.norms import compute_dtype
from hola_kernels.operation import operation


def decay_and_strength_torch(x: Tensor, heads: int, A_log_H: Tensor | None,
                             dt_bias_H: Tensor | None, beta_range: int = 1) -> tuple[Tensor, Tensor]:
    """Same contract as `decay_and_strength_reference`, with torch's own functions."""
    compute = compute_dtype(x)
    beta = x[..., :heads].to(compute).sigmoid()
    if beta_range != 1:
        beta = beta_range * beta
    if A_log_H is None:
        return torch.zeros_like(beta), beta
    a = x[..., heads: 2 * heads].to(compute)
    return -A_log_H.to(compute).exp() * F.softplus(a + dt_bias_H.to(compute)), beta


@operation
def decay_and_strength(*, x: Tensor, heads: int, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
                       beta_range: int = 1, dx_buffer: Callable[[], Tensor] | None = None,
                       backend: str = "auto") -> tuple[Tensor, Tensor]:
    """log_decay = -exp(A_log) softplus(a + dt_bias) and beta = beta_range sigmoid(b), computed in float32.

    x [..., W] holds H = `heads` numbers b, with decay H numbers a after them, then anything: its gradient is zero.
    A_log, dt_bias [H], or None for both: no decay. beta_range: 1, or 2 for beta in (0, 2).
    dx_buffer: called in the backward pass, gives memory like x where the Triton backend may leave x's gradient.

    Returns log_decay and beta [..., H] in float32 (float64 is computed in float64, not by triton); zeros without
    gradient where there is no decay. Raises KernelError.
    """
    _check(x, heads, A_log, dt_bias)
    if isinstance(beta_range, bool) or beta_range not in (1, 2):
        raise KernelError(f"beta_range: {beta_range!r} is not one of 1, 2")
    refusal = "gates do not take float64" if x.dtype == torch.float64 else None
    name = choose_backend(backend, x.device, refusal)
    if name == "triton" and x.numel():
        from hola_kernels.gates.triton_tokens import decay_and_strength_triton  # on first use: triton may be missing

        return decay_and_strength_triton(x, heads, A_log, dt_bias, beta_range, dx_buffer)
    run = decay_and_strength_reference if name == "reference" else decay_and_strength_torch
    return run(x, heads, A_log, dt_bias, beta_range)


def _check(x: Tensor, heads: int, A_log: Tensor | None, dt_bias: Tensor | None) -> None:
    if (A_log is None) != (dt_bias is None):
        raise KernelError("A_log and dt_bias belong together: give both, or neither for no decay")
    used = heads if A_log is None else 2 * heads
    if not isinstance(heads, int) or heads < 1 or not x.ndim or x.shape[-1] < used or not x.is_floating_point():
        raise KernelError(f"x {tuple(x.shape)} of {x.dtype} must be floating-point numbers [..., W], "
                          f"W of at least {used} for {heads} heads")
    check_floating(A_log=A_log, dt_bias=dt_bias)
    for name, parameter in (("A_log", A_log), ("dt_bias", dt_bias)):
        if parameter is not None and parameter.shape != (heads,):
            raise KernelError(f"{name} {tuple(parameter.shape)} must be [H] = ({heads},)")


__all__ = ["decay_and_strength"]
