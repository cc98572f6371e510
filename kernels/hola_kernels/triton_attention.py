"""hola_attention on the GPU as one autograd function, for training (no memory comes in, none goes out).

    forward    state: prepare, state pass        scores -> selection -> read, added to the state's output
    backward   state: recompute, state pass, chunk gradients       read: adds to dq, dk, dv in place

One pass of each part over memory; the two paths' gradients meet in place instead of in a sum
of autograd's. Everything the tables need of cu_seqlens is read on the CPU, once for all layers, so nothing here waits
for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.exact_cache.read_configs import read_config
from hola_kernels.exact_cache.triton_forward import launch_read_forward
from hola_kernels.exact_cache.triton_read import CacheBlocks, cache_attention_backward, norm_mean
from hola_kernels.exact_cache.triton_select import select_slots
from hola_kernels.gated_delta.triton_layout import Layout
from hola_kernels.gated_delta.triton_prepare import ReadNorm
from hola_kernels.gated_delta.triton_rule import SavedTensors, layout_for, rule_backward, rule_forward, will_train
from hola_kernels.operation import first_order
from hola_kernels.options import CacheOptions


def hola_attention_triton(*, q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor,
                          gamma_q: Tensor, gamma_k: Tensor, gate_H: Tensor, sink_H: Tensor | None,
                          options: CacheOptions, host_cu_seqlens: Tensor | None, device_cu_seqlens: Tensor,
                          equal_length: bool, max_seqlen: int | None = None, rank_MH: Tensor | None = None) -> Tensor:
    """o [M, H, V] of flat tokens cut at cu_seqlens [N + 1], on the CPU and on the device.

    max_seqlen: no segment is longer; with it host_cu_seqlens may be None. equal_length: all segments have M / N tokens.
    rank_MH: float32, what the cache ranks by; None: options.score, which is "betae", "e" or "betav".
    """
    cu_seqlens = device_cu_seqlens if max_seqlen else host_cu_seqlens
    layout = layout_for(k_MHK, v_MHV, cu_seqlens, None, max_seqlen)
    blocks = CacheBlocks.cut(device_cu_seqlens, q_MHK.shape[0], options, equal_length=equal_length)
    tokens = (x.contiguous() for x in (q_MHK, k_MHK, v_MHV, log_decay_MH, beta_MH))
    parameters = (None if x is None else x.contiguous() for x in (gamma_q, gamma_k, gate_H, sink_H))
    tensors = (*tokens, *parameters)
    return _HolaAttention.apply(*tensors, rank_MH, layout, blocks, options.score,
                                norm_mean(options.read_norm, k_MHK.shape[-1]), will_train(*tensors))


class _HolaAttention(torch.autograd.Function):
    """Saved: the inputs; of the state the chunks' U, P and scales (and states); of the read o_cache, lse, norms and
    slots."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor,
                gamma_k: Tensor, gate: Tensor, sink: Tensor | None, rank: Tensor | None, layout: Layout,
                blocks: CacheBlocks, score: str, mean: float, train: bool) -> Tensor:
        key_norm = k.new_empty(k.shape[:2], dtype=torch.float32)
        o_state, square, _, saved = rule_forward(q, k, v, log_decay, beta, None, layout,
                                                train=train, read_norm=ReadNorm(key_norm, mean))
        if rank is None:
            rank = rank_scores(score, square, v, beta) if blocks.slots else key_norm  # without slots it ranks nothing
        slots_UHw = select_slots(score_MH=rank, plan=blocks.plan, slots=blocks.slots)
        y, o_cache, lse, query_norm = launch_read_forward(
            q_MHK=q, k_RHK=k, v_RHV=v, key_norm_RH=key_norm, gamma_q=gamma_q, gamma_k=gamma_k, sink_H=sink,
            gate_H=gate, o_state_MHV=o_state, slots_UHw=slots_UHw, table=blocks.table, mean=mean, incoming=False,
            tile=read_config(k.shape[-1], v.shape[-1], k.dtype).forward, window=blocks.window)
        ctx.save_for_backward(q, k, v, log_decay, beta, gamma_q, gamma_k, gate, sink, key_norm, o_cache, lse,
                              query_norm, slots_UHw, *saved)
        ctx.layout, ctx.blocks, ctx.mean = layout, blocks, mean
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, log_decay, beta, gamma_q, gamma_k, gate, sink, key_norm, o_cache, lse, query_norm, slots_UHw,
         *saved) = ctx.saved_tensors
        dy = dy.contiguous()
        dq, dk, dr, dlog_decay, dbeta, _ = rule_backward(
            q, k, v, log_decay, beta, SavedTensors(*saved), ctx.layout, dy, None, write_dv=False)
        dq, dk, dv, dgamma_q, dgamma_k, dsink, dgate = cache_attention_backward(
            q=q, k=k, v=v, gamma_q=gamma_q, gamma_k=gamma_k, sink=sink, gate=gate, key_norm=key_norm,
            o_cache=o_cache, lse=lse, query_norm=query_norm, slots_UHw=slots_UHw, blocks=ctx.blocks, mean=ctx.mean,
            dy=dy, into=(dq, dk, dr), beta=beta)
        return dq, dk, dv, dlog_decay, dbeta, dgamma_q, dgamma_k, dgate, dsink, None, None, None, None, None, None


def rank_scores(score: str, square_MHT: Tensor, v_MHV: Tensor, beta_MH: Tensor) -> Tensor:
    """What the cache ranks by, float32 [M, H]; square: |beta e|^2 summed over each tile of V."""
    if score == "betav":
        return (beta_MH.float() * v_MHV.float().norm(dim=-1)).contiguous()
    written = square_MHT.sum(-1).sqrt_()
    return written if score == "betae" else written / beta_MH.float().clamp_min(torch.finfo(torch.float32).tiny)
