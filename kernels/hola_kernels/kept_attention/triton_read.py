"""Attention to kept tokens with Triton as one differentiable operation, and the rows of a state after the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.block_table import block_table
from hola_kernels.kept_attention.kept_tokens import KeptTokens
from hola_kernels.kept_attention.lists import KeptLists, continued_lists, kept_lists, key_tiles
from hola_kernels.kept_attention.tiles import tiles_for
from hola_kernels.kept_attention.triton_forward import launch_kept_forward
from hola_kernels.kept_attention.triton_key_gradient import launch_kept_key_gradient
from hola_kernels.kept_attention.triton_query_gradient import launch_kept_query_gradient, launch_own_gradient
from hola_kernels.operation import first_order
from hola_kernels.triton_sums import sum_parts


class KeptRead(torch.autograd.Function):
    """o [M, H, V] of flat tokens and the lists of those that are kept. Saves o and the log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, sink, log_weight, lists: KeptLists, cu_seqlens: Tensor, equal_length: bool, scale: float):
        tile = tiles_for(k.shape[-1], v.shape[-1], k.dtype).forward
        o, lse = launch_kept_forward(
            q_MHK=q, k_RHK=k, v_RHV=v, sink_H=sink, log_weight_RH=log_weight, lists=lists,
            table=block_table(cu_seqlens, q.shape[0], tile.rows, equal_length), scale=scale, tile=tile)
        ctx.save_for_backward(q, k, v, sink, log_weight, o, lse)
        ctx.lists, ctx.cu_seqlens, ctx.equal_length, ctx.scale = lists, cu_seqlens, equal_length, scale
        return o

    @staticmethod
    @first_order
    def backward(ctx, do):
        q, k, v, sink, log_weight, o, lse = ctx.saved_tensors
        tiles = tiles_for(k.shape[-1], v.shape[-1], k.dtype)
        do, lists = _rows(do), ctx.lists
        given = {"q_MHK": q, "k_MHK": k, "v_MHV": v, "do_MHV": do, "lse_MH": lse, "scale": ctx.scale}
        own = launch_own_gradient(**given, o_MHV=o, sink_H=sink)
        dsink = None if sink is None else sum_parts(own.sink_part, sink.dtype)
        given |= {"own": own, "log_weight_MH": log_weight, "lists": lists}
        table = block_table(ctx.cu_seqlens, q.shape[0], tiles.query_gradient.rows, ctx.equal_length)
        dq = launch_kept_query_gradient(**given, table=table, tile=tiles.query_gradient)
        dlog_weight = None if log_weight is None else torch.zeros_like(log_weight)
        launch_kept_key_gradient(**given, dlog_weight_MH=dlog_weight, tile=tiles.key_gradient,
                                 tiles_HU3=key_tiles(lists, ctx.cu_seqlens, tiles.key_gradient.columns))
        return dq, own.dk, own.dv, dsink, dlog_weight, None, None, None, None


def kept_attention_triton(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, keep_MH: Tensor, sink_H: Tensor | None,
                          log_weight_MH: Tensor | None, scale: float, cu_seqlens: Tensor, state: KeptTokens | None, *,
                          equal_length: bool) -> Tensor:
    """Same contract as `reference.kept_attention_reference`; equal_length: all documents are of one length."""
    sink = None if sink_H is None else sink_H.contiguous()
    weight = None if log_weight_MH is None else log_weight_MH.float().contiguous()
    q, k, v = (_rows(x) for x in (q_MHK, k_MHK, v_MHV))
    if state is None:
        lists = kept_lists(keep_MH, cu_seqlens)
        return KeptRead.apply(q, k, v, sink, weight, lists, cu_seqlens, equal_length, scale)
    sequences = state.length.numel()
    lists = continued_lists(keep_MH.view(sequences, -1, keep_MH.shape[1]), state)
    weight = torch.zeros_like(keep_MH, dtype=torch.float32) if weight is None else weight
    weight = torch.cat([weight, state.log_weight.flatten(0, 1).float()])
    k, v = (torch.cat([x, held.flatten(0, 1).to(x.dtype)]) for x, held in ((k, state.k), (v, state.v)))
    tile = tiles_for(k.shape[-1], v.shape[-1], k.dtype).forward
    return launch_kept_forward(
        q_MHK=q, k_RHK=k, v_RHV=v, sink_H=sink, log_weight_RH=weight, lists=lists,
        table=block_table(cu_seqlens, q.shape[0], tile.rows, equal_length), scale=scale, tile=tile)[0]


def _rows(x: Tensor) -> Tensor:
    """x [M, H, D] whose rows of H * D numbers are contiguous (they may lie in a wider matrix)."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
