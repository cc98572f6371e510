"""hola_attention on the GPU as one autograd function, for training (no memory comes in, none goes out).

    forward    state: prepare, walk          scores -> selection -> read, added to the state's output
    backward   state: recompute, walk, chunk gradients      read: adds to dq, dk, dv in place

One pass of each part over memory; the two paths' gradients meet in place instead of in a sum
of autograd's. Everything the tables need of the documents' cuts is read on the CPU, once for
all layers, so nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.exact_cache.read_configs import read_config
from hola_kernels.exact_cache.triton_forward import launch_read_forward
from hola_kernels.exact_cache.triton_read import Blocks, exact_read_backward, norm_mean
from hola_kernels.exact_cache.triton_select import select_slots
from hola_kernels.gated_delta.triton_layout import Layout
from hola_kernels.gated_delta.triton_prepare import ReadNorm
from hola_kernels.gated_delta.triton_rule import layout_for, rule_backward, rule_forward, will_train


def hola_attention_triton(*, q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor,
                          gamma_q: Tensor, gamma_k: Tensor, gate_H: Tensor, sink_H: Tensor | None, block: int,
                          slots: int, score: str, read_norm: str, cu_seqlens: Tensor, cuts: Tensor,
                          dense: bool, max_seqlen: int | None = None) -> Tensor:
    """o [M, H, V] of flat tokens; cu_seqlens as the caller gave it (best on the CPU), cuts the same on the device.

    max_seqlen: the cuts are read on the device only.

    score "betae", "e" or "betav"; the others rank by position and take the composed path.
    """
    layout = layout_for(k_MHK, v_MHV, cuts if max_seqlen else cu_seqlens, None, max_seqlen)
    blocks = Blocks.cut(cuts, q_MHK.shape[0], block=block, slots=slots, dense=dense)
    tensors = (q_MHK, k_MHK, v_MHV, log_decay_MH, beta_MH, gamma_q, gamma_k, gate_H, sink_H)
    return _HolaAttention.apply(*tensors, layout, blocks, score, norm_mean(read_norm, k_MHK.shape[-1]),
                                will_train(*tensors))


class _HolaAttention(torch.autograd.Function):
    """Saved: the inputs; of the state the chunks' U, P and scales (and states); of the read o_cache, lse, norms and
    slots."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor,
                gamma_k: Tensor, gate: Tensor, sink: Tensor | None, layout: Layout, blocks: Blocks, score: str,
                mean: float, train: bool) -> Tensor:
        q, k, v, log_decay, beta = (x.contiguous() for x in (q, k, v, log_decay, beta))
        key_norm = k.new_empty(k.shape[:2], dtype=torch.float32)
        o_state, square, _, kept = rule_forward(q, k, v, log_decay, beta, None, layout,
                                                train=train, read_norm=ReadNorm(key_norm, mean))
        slots_UHw = select_slots(score_MH=_rank(score, square, v, beta), plan=blocks.plan, slots=blocks.slots)
        y, o_cache, lse, query_norm = launch_read_forward(
            q_MHK=q, k_RHK=k, v_RHV=v, key_norm_RH=key_norm, gamma_q=gamma_q, gamma_k=gamma_k, sink_H=sink,
            gate_H=gate, o_state_MHV=o_state, slots_UHw=slots_UHw, units=blocks.units, mean=mean, incoming=False,
            tile=read_config(k.shape[-1], v.shape[-1], k.dtype).forward)
        ctx.save_for_backward(q, k, v, log_decay, beta, gamma_q, gamma_k, gate, sink, key_norm, o_cache, lse,
                              query_norm, slots_UHw, *kept)
        ctx.layout, ctx.blocks, ctx.mean = layout, blocks, mean
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, log_decay, beta, gamma_q, gamma_k, gate, sink, key_norm, o_cache, lse, query_norm, slots_UHw,
         *kept) = ctx.saved_tensors
        dy = dy.contiguous()
        dq, dk, dr, dlog_decay, dbeta, _ = rule_backward(q, k, v, log_decay, beta, kept, ctx.layout, dy, None,
                                                         write_dv=False)
        dq, dk, dv, dgamma_q, dgamma_k, dsink, dgate = exact_read_backward(
            q=q, k=k, v=v, gamma_q=gamma_q, gamma_k=gamma_k, sink=sink, gate=gate, key_norm=key_norm,
            o_cache=o_cache, lse=lse, query_norm=query_norm, slots_UHw=slots_UHw, blocks=ctx.blocks, mean=ctx.mean,
            dy=dy, into=(dq, dk, dr), beta=beta)
        return dq, dk, dv, dlog_decay, dbeta, dgamma_q, dgamma_k, dgate, dsink, None, None, None, None, None


def _rank(score: str, square_MHT: Tensor, v_MHV: Tensor, beta_MH: Tensor) -> Tensor:
    """What the cache ranks by, float32 [M, H]; square: |beta e|^2 summed over each tile of V."""
    if score == "betav":
        return (beta_MH.float() * v_MHV.float().norm(dim=-1)).contiguous()
    written = square_MHT.sum(-1).sqrt_()
    return written if score == "betae" else written / beta_MH.float().clamp_min(torch.finfo(torch.float32).tiny)
