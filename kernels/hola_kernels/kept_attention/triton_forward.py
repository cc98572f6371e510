"""Attention to kept tokens, forward: one softmax over the list of kept tokens, the token itself and the sink.

One program owns `rows` queries of one document and head. Its softmax starts with the queries' own tokens and the sink,
both of them rows of the program, and goes on over tiles of the head's list, from the document's first entry to the last
that one of the queries reads. Keys and values are gathered by the rows in the list.

Work for B, T, H and a share f of kept tokens, K = V = D: 2 f D T FLOP a query and head (4 f D T / 2, the causal half);
HBM reads q, k, v once and writes o; the gathered rows come from L2 again for every tile of queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.block_table import BlockTable
from hola_kernels.exact_cache.read_configs import Tile
from hola_kernels.exact_cache.triton_forward import LOG2E, sink_logit, softmax_step
from hola_kernels.kept_attention.lists import KeptLists
from hola_kernels.triton_block_table import COUNT, SEGMENT, START, block_entry


@triton.jit
def _kept_forward_kernel(q_ptr, k_ptr, v_ptr, sink_ptr, weight_ptr, rows_ptr, before_ptr, first_ptr, entries_ptr, o_ptr,
                         lse_ptr, q_stride, k_stride, v_stride, list_stride, tokens, documents, blocks, H, scale,
                         K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                         SINK: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr):
    """o [M, H, V] and lse [M, H] (log2) of [ROWS] queries of a block and head.

    Shared memory: q [ROWS, K] once, k and v tiles [COLUMNS, K or V] per stage.
    Registers: o [ROWS, V] float32, logits [ROWS, COLUMNS] float32, row maxima and sums.
    """
    h = tl.program_id(0) % H
    block = blocks - 1 - tl.program_id(0) // H  # the longest loops first
    start = block_entry(entries_ptr, block, START)
    count = block_entry(entries_ptr, block, COUNT)
    document = block_entry(entries_ptr, block, SEGMENT)
    if count > 0:
        r_R, c_C, d_K, d_V = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, K), tl.arange(0, V)
        is_row = r_R < count
        row_R = (start + r_R).to(tl.int64)
        dtype = v_ptr.dtype.element_ty
        list_at = h.to(tl.int64) * list_stride
        before_at = before_ptr + h.to(tl.int64) * tokens + start
        base2 = scale * LOG2E

        q = tl.load(q_ptr + (row_R * q_stride + h * K)[:, None] + d_K[None, :], mask=is_row[:, None], other=0.0)
        own_k = tl.load(k_ptr + (row_R * k_stride + h * K)[:, None] + d_K[None, :], mask=is_row[:, None], other=0.0)
        own = tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1) * base2
        o = tl.load(v_ptr + (row_R * v_stride + h * V)[:, None] + d_V[None, :], mask=is_row[:, None],
                    other=0.0).to(tl.float32)
        highest = own
        total = tl.zeros((ROWS,), tl.float32) + 1.0
        if SINK:
            sink = sink_logit(sink_ptr, h)
            highest = tl.maximum(own, sink)
            share = tl.exp2(own - highest)
            total = share + tl.exp2(sink - highest)
            o = o * share[:, None]

        before_R = tl.load(before_at + r_R, mask=is_row, other=0)
        begin = tl.load(first_ptr + h * (documents + 1) + document)
        end = tl.load(before_at + count - 1)
        for first in tl.range(begin, end, COLUMNS):
            index_C = first + c_C
            seen = index_C < end
            row_C = tl.load(rows_ptr + list_at + index_C, mask=seen, other=0).to(tl.int64)
            k = tl.load(k_ptr + (row_C * k_stride + h * K)[:, None] + d_K[None, :], mask=seen[:, None], other=0.0)
            v = tl.load(v_ptr + (row_C * v_stride + h * V)[:, None] + d_V[None, :], mask=seen[:, None], other=0.0)
            logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * base2
            if WEIGHTED:
                logit += (tl.load(weight_ptr + row_C * H + h, mask=seen, other=0.0) * LOG2E)[None, :]
            logit = tl.where(index_C[None, :] < before_R[:, None], logit, float("-inf"))
            highest, total, o = softmax_step(logit, v, highest, total, o, False, PRECISION)

        o = o * (1.0 / total)[:, None]
        at_H = row_R * H + h
        tl.store(lse_ptr + at_H, highest + tl.log2(total), mask=is_row)
        tl.store(o_ptr + at_H[:, None] * V + d_V[None, :], o.to(dtype), mask=is_row[:, None])


def launch_kept_forward(*, q_MHK: Tensor, k_RHK: Tensor, v_RHV: Tensor, sink_H: Tensor | None,
                        log_weight_RH: Tensor | None, lists: KeptLists, table: BlockTable, scale: float,
                        tile: Tile) -> tuple[Tensor, Tensor]:
    """(o [M, H, V], lse [M, H] to base 2). Rows R of k, v and log weights: the M tokens, and others that lists
    name; blocks of tile.rows tokens; log weights contiguous float32."""
    (tokens, heads, key_dim), value_dim = q_MHK.shape, v_RHV.shape[2]
    o = torch.empty(tokens, heads, value_dim, dtype=v_RHV.dtype, device=q_MHK.device)
    lse_MH = torch.empty(tokens, heads, dtype=torch.float32, device=q_MHK.device)
    _kept_forward_kernel[(table.count * heads,)](
        q_MHK, k_RHK, v_RHV, lse_MH if sink_H is None else sink_H, lse_MH if log_weight_RH is None else log_weight_RH,
        lists.rows, lists.before, lists.first, table.entries, o, lse_MH, q_MHK.stride(0), k_RHK.stride(0),
        v_RHV.stride(0), lists.rows.stride(0), tokens, lists.first.shape[1] - 1, table.count, heads, scale, K=key_dim,
        V=value_dim, ROWS=tile.rows, COLUMNS=tile.columns, SINK=sink_H is not None,
        WEIGHTED=log_weight_RH is not None, PRECISION="tf32x3", **tile.launch)
    return o, lse_MH
