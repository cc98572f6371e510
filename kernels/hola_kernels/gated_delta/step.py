"""The gated delta rule for one token: what decoding repeats."""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_step
from hola_kernels.norms import compute_dtype, l2_normalize
from hola_kernels.operation import operation

STEP_WIDTHS = (16, 32, 64, 128, 256)
STEP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@operation
@torch.no_grad()
def gated_delta_step(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor,
                     backend: str = "auto") -> tuple[Tensor, Tensor]:
    """One token for each of N sequences; `state` [N, H, K, V] is updated in place.

    q, k [N, H, K], v [N, H, V], log_decay, beta [N, H]. backend: as in hola_attention_step. Returns o [N, H, V] and
    the score [N, H] (beta * |residual|), both float32 (float64 in float64 calls). Raises KernelError.
    """
    check_step(q, k, v, log_decay, beta, state)
    refusal = step_refusal(q, k, v) or (None if state.is_contiguous() else "a state that is not contiguous")
    name = choose_backend(backend, q.device, refusal)
    if name == "triton" and not q.shape[0]:
        name = "torch"
    return (_step_triton if name == "triton" else _step_torch)(q, k, v, log_decay, beta, state)


def step_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the Triton launches of a step do not take these tokens, or None."""
    if k.shape[-1] not in STEP_WIDTHS or v.shape[-1] not in STEP_WIDTHS:
        return f"a step takes K and V of {', '.join(map(str, STEP_WIDTHS))}, not {k.shape[-1]} and {v.shape[-1]}"
    if any(x.dtype not in STEP_DTYPES for x in (q, k, v)):
        return f"a step takes float32, float16 and bfloat16, not {v.dtype}"
    return None


def _step_triton(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
                 state: Tensor) -> tuple[Tensor, Tensor]:
    from hola_kernels.triton_attention_step import state_step  # on first use: triton may be missing

    q, k, v, log_decay, beta = (x.contiguous() for x in (q, k, v, log_decay, beta))
    o, square = state_step(q=q, k=k, v=v, log_decay=log_decay, beta=beta, state=state)
    return o, beta.float() * square.sum(-1).sqrt()


def _step_torch(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
                state: Tensor) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(v)
    unit_q, unit_k, beta = l2_normalize(q.to(compute)), l2_normalize(k.to(compute)), beta.to(compute)
    decayed = log_decay.to(compute).exp()[..., None, None] * state
    residual = v.to(compute) - (decayed * unit_k[..., None]).sum(-2)
    state.copy_(decayed + (beta[..., None] * unit_k)[..., None] * residual[..., None, :])
    return (state * unit_q[..., None]).sum(-2) * q.shape[-1] ** -0.5, beta * residual.norm(dim=-1)
