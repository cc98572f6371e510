"""The gated delta rule on the GPU: five launches, forward and backward, as one autograd function.

    forward    prepare (every chunk)        walk_forward (every span)
    backward   recompute_states (span)      walk_backward (span)         chunk_gradients (chunk)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.gated_delta.triton_gradient import chunk_gradients
from hola_kernels.gated_delta.triton_layout import Layout, layout_of
from hola_kernels.gated_delta.triton_prepare import prepare
from hola_kernels.gated_delta.triton_walk import recompute_states, walk_backward, walk_forward

WHOLE_SEGMENT = 1 << 20  # chunks


def gated_delta_triton(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor,
                       cu_seqlens: Tensor, state_NHKV: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `torch_chunked.gated_delta_chunked`, but o in v's dtype; no state means zeros.

    cu_seqlens may lie on the CPU (then nothing waits for the device); its layout is made once a tensor.
    """
    layout = layout_of(cu_seqlens, q_MHK.device, WHOLE_SEGMENT)
    state = None if state_NHKV is None else state_NHKV.float()
    return _GatedDelta.apply(q_MHK, k_MHK, v_MHV, log_decay_MH, beta_MH, state, layout)


class _GatedDelta(torch.autograd.Function):
    """Kept for the backward pass: the inputs and each chunk's U and P (256 bytes a token and head) and scales (32)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None,
                layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, log_decay, beta = (x.contiguous() for x in (q, k, v, log_decay, beta))
        state = None if state is None else state.contiguous()
        precision = "tf32x3" if v.dtype == torch.float32 else "tf32"
        scales, solve, attend = prepare(q_MHK=q, k_MHK=k, log_decay_MH=log_decay, beta_MH=beta, chunks=layout.chunks,
                                        precision=precision)
        o, square, last = walk_forward(q_MHK=q, k_MHK=k, v_MHV=v, scales=scales, solve=solve, attend=attend,
                                       layout=layout, state_PHKV=state, precision=precision)
        score = square.sum(-1).sqrt_()
        ctx.save_for_backward(q, k, v, log_decay, beta, state, scales, solve, attend)
        ctx.layout, ctx.precision = layout, precision
        ctx.mark_non_differentiable(score)
        ctx.set_materialize_grads(False)
        return o, score, last

    @staticmethod
    def backward(ctx, do: Tensor | None, _: None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, state, scales, solve, attend = ctx.saved_tensors
        layout, precision = ctx.layout, ctx.precision
        do = torch.zeros_like(v) if do is None else do.contiguous()
        states, residual = recompute_states(k_MHK=k, v_MHV=v, scales=scales, solve=solve, layout=layout,
                                            state_PHKV=state, precision=precision)
        dr, dstates, dstate = walk_backward(q_MHK=q, k_MHK=k, do_MHV=do, scales=scales, solve=solve, attend=attend,
                                            layout=layout, dstate_PHKV=None if dlast is None else dlast.contiguous(),
                                            precision=precision)
        dq, dk, dv, dlog_decay, dbeta = chunk_gradients(
            q_MHK=q, k_MHK=k, do_MHV=do, residual=residual, states=states, dstates=dstates, dr=dr, scales=scales,
            attend=attend, chunks=layout.chunks, log_decay_MH=log_decay, beta_MH=beta, precision=precision)
        return dq, dk, dv, dlog_decay, dbeta, dstate if ctx.needs_input_grad[5] else None, None
