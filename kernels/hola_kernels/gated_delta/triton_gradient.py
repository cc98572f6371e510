"""The gradients of every chunk, all chunks at once, from the states on both of its sides.

Given S (incoming state), dS (gradient of the outgoing one), e and dr of a chunk, with x = beta e:

    dq^   = query_in (do S^T) + M k^                    M_ij  = K^-1/2 (do_i.x_j) exp(g_i - g_j), j <= i
    dk^   = - exp(g) beta (dr S^T) + exp(g_end - g) (x dS^T) + M^T q^ + (G + G^T) k^
    dbeta = dr.e      dv = beta dr                      G_ij  = - beta_i (dr_i.x_j) exp(g_i - g_j), j < i
    dg_i  = what multiplies exp(g_i) minus what multiplies exp(-g_i), term by term as above, so that
            the undecayed parts (the diagonal of M) cancel exactly and a fast decay keeps its digits
    d log_decay_t = sum of dg from t to the end of the chunk + <S_out, dS>

The unit lengths of q and k are undone last: dq = rq (dq^ - q^ (q^.dq^)).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.gated_delta.triton_prepare import BETA, DECAY, KEY_NORM, QUERY_NORM, SCALES
from hola_kernels.triton_config import launch_of



@triton.jit
def _gradient_kernel(q, k, do, residual, states, dstates, scales, attend, chunks,
                     dr_dv, dq, dk, dlog_decay, dbeta, value_tiles, key_parts,
                     H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                     ROWS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    """One program a chunk and head. dr comes in where dv goes out.

    Registers: dq, dk [64, K] and four [64, 64] products, fp32. Shared memory: S^T or dS^T [BV, K] and the
    [64, BV] tiles of do, dr, e, STAGES deep; k and q [64, K] at the end.
    """
    pid = tl.program_id(0)
    chunk, head = pid // H, pid % H
    start = tl.load(chunks + chunk * 2).to(tl.int64)
    length = tl.load(chunks + chunk * 2 + 1)
    place, dim, col = tl.arange(0, C), tl.arange(0, K), tl.arange(0, BV)
    inside = place < length
    at, here = start * H + head, pid.to(tl.int64)
    value_tile = place[:, None] * (H * V) + col[None, :]
    state_tile = col[:, None] * K + dim[None, :]
    narrow = k.dtype.element_ty
    row = scales + here * (ROWS * C) + place
    g = tl.load(row + DECAY * C)
    b = tl.load(row + BETA * C)
    g_end = tl.load(scales + here * (ROWS * C) + DECAY * C + (C - 1))

    # first over the columns of v: dq, and the two products among the chunk's tokens
    dq_CK = tl.zeros([C, K], tl.float32)
    do_e_CC, dr_e_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for j in tl.range(0, value_tiles, num_stages=STAGES):
        values = at * V + j * BV + value_tile
        do_CV = tl.load(do + values, mask=inside[:, None], other=0.0)
        dr_CV = tl.load(dr_dv + values, mask=inside[:, None], other=0.0)
        e_CV = tl.load(residual + values, mask=inside[:, None], other=0.0)
        s_VK = tl.load(states + here * (V * K) + j * (BV * K) + state_tile)
        dq_CK = tl.dot(do_CV, s_VK, dq_CK, input_precision=PRECISION)
        do_e_CC = tl.dot(do_CV, tl.trans(e_CV), do_e_CC, input_precision=PRECISION)
        dr_e_CC = tl.dot(dr_CV, tl.trans(e_CV), dr_e_CC, input_precision=PRECISION)

    # the [64, 64] matrices; masked before exp: above the diagonal the differences may overflow
    key_tile = place[:, None] * (H * K) + dim[None, :]
    rk, rq = tl.load(row + KEY_NORM * C), tl.load(row + QUERY_NORM * C)
    root: tl.constexpr = K ** -0.5
    below, above = place[:, None] > place[None, :], place[:, None] < place[None, :]
    same = place[:, None] == place[None, :]
    decay_CC = tl.exp(tl.where(above, float("-inf"), g[:, None] - g[None, :]))
    dbeta_C = tl.sum(tl.where(same, dr_e_CC, 0.0), 1)
    tl.store(dbeta + at + place * H, dbeta_C.to(dbeta.dtype.element_ty), mask=inside)
    m_CC = do_e_CC * decay_CC * root
    g_CC = tl.where(below, -dr_e_CC * decay_CC, 0.0)  # M and G without their factors beta
    p_CC = tl.load(attend + here * (C * C) + place[:, None] * C + place[None, :]).to(tl.float32)
    kk_CC = tl.zeros([C, C], tl.float32)
    part_tile = place[:, None] * (H * K) + tl.arange(0, 64)[None, :]
    for part in tl.range(0, key_parts, num_stages=STAGES):  # in parts: both sides of k in fp32 outgrow shared memory
        k_C64 = tl.load(k + at * K + part * 64 + part_tile, mask=inside[:, None], other=0.0)
        kk_CC = tl.dot(k_C64, tl.trans(k_C64), kk_CC, input_precision=PRECISION)
    # <dP, P> and <dN, N>: their rows and columns are what the chunk's own tokens add along q^ and k^
    along_p = do_e_CC * p_CC * b[None, :]
    along_n = g_CC * kk_CC * (rk * b)[:, None] * (rk * b)[None, :]
    rows_p, columns_p = tl.sum(along_p, 1), tl.sum(along_p, 0)
    rows_n, columns_n = tl.sum(along_n, 1), tl.sum(along_n, 0)
    # transposed in fp32: transposing the 16-bit copy of an accumulator is what Triton before 3.7.1 miscompiles
    to_q_CC = (tl.trans(m_CC) * rq[None, :]).to(narrow)
    to_k_CC = ((g_CC + tl.trans(g_CC)) * (rk * b)[None, :]).to(narrow)

    # q and k meet the accumulators as products with the identity: exact, and already in the accumulators' layout
    # (a loaded tile would make the compiler move every [64, K] product through shared memory for its row sums)
    identity = tl.where(same, 1.0, 0.0).to(narrow)
    k_CK = tl.load(k + at * K + key_tile, mask=inside[:, None], other=0.0)
    q_CK = tl.load(q + at * K + key_tile, mask=inside[:, None], other=0.0)
    dq_CK = dq_CK * (tl.exp(g) * root)[:, None]
    unit_q = tl.dot(identity, q_CK, input_precision=PRECISION) * rq[:, None]
    along_q = tl.sum(dq_CK * unit_q, 1)
    dq_CK = tl.dot((m_CC * (rk * b)[None, :]).to(narrow), k_CK, dq_CK, input_precision=PRECISION)
    dq_CK = (dq_CK - unit_q * (along_q + rows_p)[:, None]) * rq[:, None]
    tl.store(dq + at * K + key_tile, dq_CK.to(narrow), mask=inside[:, None])

    # again over the columns of v: dk from the states before and after, kept apart for dg; <S, dS> is a trace
    dk_CK, after_CK = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
    product_VV = tl.zeros([BV, BV], tl.float32)
    for j in tl.range(0, value_tiles, num_stages=STAGES):
        values = at * V + j * BV + value_tile
        dr_CV = tl.load(dr_dv + values, mask=inside[:, None], other=0.0)
        e_CV = tl.load(residual + values, mask=inside[:, None], other=0.0)
        s_VK = tl.load(states + here * (V * K) + j * (BV * K) + state_tile)
        ds_VK = tl.load(dstates + here * (V * K) + j * (BV * K) + state_tile)
        dk_CK = tl.dot(dr_CV, s_VK, dk_CK, input_precision=PRECISION)
        after_CK = tl.dot(e_CV, ds_VK, after_CK, input_precision=PRECISION)
        product_VV = tl.dot(s_VK, tl.trans(ds_VK), product_VV, input_precision=PRECISION)
        tl.store(dr_dv + values, (dr_CV.to(tl.float32) * b[:, None]).to(narrow), mask=inside[:, None])
    trace = tl.sum(tl.sum(tl.where(col[:, None] == col[None, :], product_VV, 0.0), 1), 0)

    # read again rather than kept: k and q would fill shared memory all through the loop
    k_CK = tl.load(k + at * K + key_tile, mask=inside[:, None], other=0.0)
    unit_k = tl.dot(identity, k_CK, input_precision=PRECISION) * rk[:, None]
    dk_CK = dk_CK * (-tl.exp(g) * b)[:, None]
    after_CK = after_CK * (tl.exp(g_end - g) * b)[:, None]
    along_k, outgoing = tl.sum(dk_CK * unit_k, 1), tl.sum(after_CK * unit_k, 1)
    dg = rows_p - columns_p + rows_n - columns_n + along_q + along_k - outgoing
    boundary = tl.exp(g_end) * trace + tl.sum(outgoing, 0)
    dlog = tl.sum(tl.where(below, 0.0, dg[None, :]), 1) + boundary
    tl.store(dlog_decay + at + place * H, dlog.to(dlog_decay.dtype.element_ty), mask=inside)

    # beta multiplies the products, not the sum: two products into one accumulator count as a chain, and a chain
    # spreads the warps over 128 rows where there are 64
    dk_CK += after_CK - unit_k * (along_k + outgoing + columns_p + rows_n + columns_n)[:, None]
    dk_CK += tl.dot(to_k_CC, k_CK, input_precision=PRECISION) * b[:, None]
    q_CK = tl.load(q + at * K + key_tile, mask=inside[:, None], other=0.0)
    dk_CK += tl.dot(to_q_CC, q_CK, input_precision=PRECISION) * b[:, None]
    tl.store(dk + at * K + key_tile, (dk_CK * rk[:, None]).to(narrow), mask=inside[:, None])


def chunk_gradients(*, q_MHK: Tensor, k_MHK: Tensor, do_MHV: Tensor, residual: Tensor, states: Tensor,
                    dstates: Tensor, dr: Tensor, scales: Tensor, attend: Tensor, chunks: Tensor,
                    log_decay_MH: Tensor, beta_MH: Tensor,
                    precision: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_decay, dbeta, each shaped and typed as its input; dv takes the memory of dr."""
    (_, heads, value_dim), key_dim = do_MHV.shape, k_MHK.shape[2]
    launch = launch_of("gated_delta_gradient", key_dim, value_dim, do_MHV.element_size())
    dq, dk = torch.empty_like(q_MHK), torch.empty_like(k_MHK)
    dlog_decay, dbeta = torch.empty_like(log_decay_MH), torch.empty_like(beta_MH)
    if chunks.shape[0]:
        _gradient_kernel[(chunks.shape[0] * heads,)](
            q_MHK, k_MHK, do_MHV, residual, states, dstates, scales, attend, chunks, dr, dq, dk, dlog_decay, dbeta,
            value_dim // launch.tile, key_dim // 64, H=heads, K=key_dim, V=value_dim, BV=launch.tile, C=64, ROWS=SCALES,
            PRECISION=precision, STAGES=launch.stages, num_warps=launch.warps)
    return dq, dk, dr, dlog_decay, dbeta
