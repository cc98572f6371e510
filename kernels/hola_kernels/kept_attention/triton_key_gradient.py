"""Attention to kept tokens, backward: dk, dv and the gradient of the log weights of kept tokens.

    dv_j = sum_i P_ij do_i       dk_j = scale sum_i dS_ij q_i       dw_j = sum_i dS_ij       (i > j, same document)
One program owns `columns` entries of a head's list and loops over all queries from after its first entry to the end of
the document. Entries are gathered once, queries come in whole tiles. All products have entries as rows, [columns, .]:
no matrix that was computed is transposed. The sums are added to what the tokens' reads of themselves left: no other
program reads or writes these rows, so the order of sums is fixed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.descriptors import token_tiles
from hola_kernels.exact_cache.read_configs import Tile
from hola_kernels.exact_cache.triton_forward import LOG2E
from hola_kernels.kept_attention.lists import KeptLists
from hola_kernels.kept_attention.triton_query_gradient import OwnGradient


@triton.jit
def _add_queries(dk, dv, dweight, q, do, k, v, index_C, bias_C, row, end, before_at, lse_ptr, delta_ptr, H, h, base2,
                 one, ROWS: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr):
    """dk, dv, dweight with the sums over the queries [row, row + ROWS) that lie before `end`."""
    dtype = q.dtype
    r_R = tl.arange(0, ROWS)
    is_row = row + r_R < end
    at_H = (row + r_R).to(tl.int64) * H + h
    before_R = tl.load(before_at + row + r_R, mask=is_row, other=0)
    lse = tl.load(lse_ptr + at_H, mask=is_row, other=0.0)
    delta = tl.load(delta_ptr + at_H, mask=is_row, other=0.0)
    logit = tl.dot(k, tl.trans(q), input_precision=PRECISION) * base2
    if WEIGHTED:
        logit += bias_C[:, None]
    visible = index_C[:, None] < before_R[None, :]
    weight = tl.where(visible, tl.exp2(logit - lse[None, :]), 0.0)
    # times one (a number the compiler does not know): no product is left running into the next step, where the
    # registers of its left operand would be written before anything waits for it (triton issue 9433)
    dv = tl.dot(weight.to(dtype), do, dv, input_precision=PRECISION) * one
    inner = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    dlogit = tl.where(visible, weight * (inner - delta[None, :]), 0.0)
    if WEIGHTED:
        dweight += tl.sum(dlogit, 1)
    dk = tl.dot(dlogit.to(dtype), q, dk, input_precision=PRECISION) * one
    return dk, dv, dweight


@triton.jit
def _kept_key_gradient_kernel(q, do, k_ptr, v_ptr, lse_ptr, delta_ptr, weight_ptr, rows_ptr, before_ptr, tiles_ptr,
                              dk_ptr, dv_ptr, dweight_ptr, k_stride, v_stride, list_stride, tokens, tiles, H, scale,
                              one, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                              WEIGHTED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds to dk [M, H, K] and dv [M, H, V], and fills dweight [M, H] of [COLUMNS] entries of a head's list.

    Shared memory: k [COLUMNS, K], v [COLUMNS, V] once, q and do tiles [ROWS, K or V] per stage.
    Registers: dk [COLUMNS, K] and dv [COLUMNS, V] float32, two [COLUMNS, ROWS] float32.
    """
    h = tl.program_id(0) % H
    tile = tl.program_id(0) // H  # the longest loops first
    at = tiles_ptr + (h.to(tl.int64) * tiles + tile) * 3
    first, count, end = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    if count > 0:
        c_C, d_K, d_V = tl.arange(0, COLUMNS), tl.arange(0, K), tl.arange(0, V)
        seen = c_C < count
        list_at = rows_ptr + h.to(tl.int64) * list_stride + first
        row_C = tl.load(list_at + c_C, mask=seen, other=0).to(tl.int64)
        k = tl.load(k_ptr + (row_C * k_stride + h * K)[:, None] + d_K[None, :], mask=seen[:, None], other=0.0)
        v = tl.load(v_ptr + (row_C * v_stride + h * V)[:, None] + d_V[None, :], mask=seen[:, None], other=0.0)
        index_C = first + c_C  # rows after the tile's entries hold anything, and are not stored
        bias_C = tl.zeros((COLUMNS,), tl.float32)
        if WEIGHTED:
            bias_C = tl.load(weight_ptr + row_C * H + h, mask=seen, other=0.0) * LOG2E
        before_at = before_ptr + h.to(tl.int64) * tokens
        dk = tl.zeros((COLUMNS, K), tl.float32)
        dv = tl.zeros((COLUMNS, V), tl.float32)
        dweight = tl.zeros((COLUMNS,), tl.float32)
        start = tl.load(list_at) + 1
        whole = start + (end - start) // ROWS * ROWS
        base2 = scale * LOG2E
        for row in tl.range(start, whole, ROWS):
            dk, dv, dweight = _add_queries(dk, dv, dweight, q.load([row, h * K]), do.load([row, h * V]), k, v, index_C,
                                           bias_C, row, end, before_at, lse_ptr, delta_ptr, H, h, base2, one, ROWS,
                                           WEIGHTED, PRECISION)
        if whole < end:
            # rows after the document's end are another's and perhaps infinite
            is_row = (whole + tl.arange(0, ROWS) < end)[:, None]
            last_q, last_do = q.load([whole, h * K]), do.load([whole, h * V])
            last_q = tl.where(is_row, last_q, 0.0).to(last_q.dtype)
            last_do = tl.where(is_row, last_do, 0.0).to(last_do.dtype)
            dk, dv, dweight = _add_queries(dk, dv, dweight, last_q, last_do, k, v, index_C, bias_C, whole, end,
                                           before_at, lse_ptr, delta_ptr, H, h, base2, one, ROWS, WEIGHTED, PRECISION)
        at_H = row_C * H + h
        dk_at = dk_ptr + at_H[:, None] * K + d_K[None, :]
        dk = dk * scale + tl.load(dk_at, mask=seen[:, None], other=0.0).to(tl.float32)
        tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=seen[:, None])
        dv_at = dv_ptr + at_H[:, None] * V + d_V[None, :]
        dv += tl.load(dv_at, mask=seen[:, None], other=0.0).to(tl.float32)
        tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=seen[:, None])
        if WEIGHTED:
            tl.store(dweight_ptr + at_H, dweight, mask=seen)


def launch_kept_key_gradient(*, q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, do_MHV: Tensor, lse_MH: Tensor,
                             own: OwnGradient, log_weight_MH: Tensor | None, dlog_weight_MH: Tensor | None,
                             lists: KeptLists, tiles_HU3: Tensor, scale: float, tile: Tile) -> None:
    """Adds what later tokens read to own.dk and own.dv, and fills the kept tokens' dlog_weight (float32, contiguous).

    tiles_HU3: the lists in tiles of tile.columns entries.
    """
    (tokens, heads, key_dim), value_dim = q_MHK.shape, v_MHV.shape[2]
    weighted = log_weight_MH is not None
    _kept_key_gradient_kernel[(tiles_HU3.shape[1] * heads,)](
        token_tiles(q_MHK, tile.rows, key_dim), token_tiles(do_MHV, tile.rows, value_dim), k_MHK, v_MHV, lse_MH,
        own.delta, log_weight_MH if weighted else lse_MH, lists.rows, lists.before, tiles_HU3, own.dk, own.dv,
        dlog_weight_MH if weighted else own.delta, k_MHK.stride(0), v_MHV.stride(0), lists.rows.stride(0), tokens,
        tiles_HU3.shape[1], heads, scale, 1.0, K=key_dim, V=value_dim, ROWS=tile.rows, COLUMNS=tile.columns,
        WEIGHTED=weighted, PRECISION="tf32x3", **tile.launch)
