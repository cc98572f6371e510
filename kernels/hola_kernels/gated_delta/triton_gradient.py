"""The gradients of every chunk, all chunks at once, from the states on both of its sides.

Given S (incoming state), dS (gradient of the outgoing one), e and dr of a chunk, with x = beta e:

    dq^   = K^-1/2 exp(g) (do S^T) + M k^                     M_ij  = K^-1/2 (do_i.x_j) exp(g_i - g_j), j <= i
    dk^   = - exp(g) beta (dr S^T) + exp(g_end - g) (x dS^T) + M^T q^ + (G + G^T) k^
    dbeta = dr.e      dv = beta dr                            G_ij  = - beta_i (dr_i.x_j) exp(g_i - g_j), j < i
    dg_i  = what multiplies exp(g_i) minus what multiplies exp(-g_i), term by term as above, so that
            the undecayed parts (the diagonal of M) cancel exactly and a fast decay keeps its digits
    d log_decay_t = sum of dg from t to the end of the chunk + <S_out, dS>

The unit lengths of q and k are undone last: dq = rq (dq^ - q^ (q^.dq^)).

Three launches, because all of it in one program spills its registers, which cost more than reading S twice: the
[64, 64] matrices, then dq, then dk. Two rules of their loops come from the compiler (Triton 3.6 and 3.7):
a tile of a pipelined loop goes into products only, never also into registers (it is overwritten too early), and
no product's result may reach another product (the warps would be spread over 128 rows where there are 64).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hola_kernels.descriptors import tiles_of
from hola_kernels.gated_delta.triton_layout import CHUNK
from hola_kernels.gated_delta.triton_prepare import BETA, DECAY, DECAY_LOW, KEY_NORM, QUERY_NORM, SCALES
from hola_kernels.gated_delta.triton_tables import load_chunk
from hola_kernels.triton_config import Launch, launch_of

# rows of the sums [U, H, SUMS, 64]
SUMS = 4
ALONG_Q = tl.constexpr(0)    # q^.(M k^)
ALONG_K = tl.constexpr(1)    # k^.(M^T q^ + (G + G^T) k^)
DECAY_OWN = tl.constexpr(2)  # dg of the chunk's own tokens
DECAY_Q = tl.constexpr(3)    # dg through the incoming state, from q


@triton.jit
def _matrix_kernel(k, do, dr, residual, dr_rows, scales, attend, chunks, dv, dbeta, to_dq, from_q, from_k, sums,
                   H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                   ROWS: tl.constexpr, SUM_ROWS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
                   WRITE_DV: tl.constexpr):
    """One program a chunk and head: do e^T, dr e^T and k k^T [64, 64] in registers; tiles [64, BV] of v, [64, 64] of k.

    Writes dv (if WRITE_DV), dbeta and, ready to be multiplied, M rk beta, M^T rq and (G + G^T) rk, rows without their
    factor beta.
    """
    pid = tl.program_id(0)
    chunk, head = pid // H, pid % H
    start, length = load_chunk(chunks, chunk)
    offset, col = tl.arange(0, C), tl.arange(0, BV)
    inside = offset < length
    at, here = start.to(tl.int64) * H + head, pid.to(tl.int64)
    dtype = k.dtype
    row = scales + here * (ROWS * C) + offset
    g, low, b = tl.load(row + DECAY * C), tl.load(row + DECAY_LOW * C), tl.load(row + BETA * C)
    rk, rq = tl.load(row + KEY_NORM * C), tl.load(row + QUERY_NORM * C)

    do_e_CC, dr_e_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    value_tile = at * V + offset[:, None] * (H * V) + col[None, :]
    for j in tl.range(0, V // BV, num_stages=STAGES):
        do_CV = do.load([start, head * V + j * BV])
        dr_CV = dr.load([start, head * V + j * BV])
        e_CV = residual.load([start, head * V + j * BV])
        do_e_CC = tl.dot(do_CV, tl.trans(e_CV), do_e_CC, input_precision=PRECISION)
        dr_e_CC = tl.dot(dr_CV, tl.trans(e_CV), dr_e_CC, input_precision=PRECISION)
        if WRITE_DV:  # once more: a tile that goes into a product must not go into registers as well
            again_CV = tl.load(dr_rows + j * BV + value_tile, mask=inside[:, None], other=0.0).to(tl.float32)
            tl.store(dv + j * BV + value_tile, (again_CV * b[:, None]).to(dtype), mask=inside[:, None])
    kk_CC = tl.zeros([C, C], tl.float32)
    for part in tl.range(0, K // 64, num_stages=STAGES):
        k_C64 = k.load([start, head * K + part * 64])
        kk_CC = tl.dot(k_C64, tl.trans(k_C64), kk_CC, input_precision=PRECISION)

    root: tl.constexpr = K ** -0.5
    matrix = here * (C * C) + offset[:, None] * C + offset[None, :]
    # chosen, not multiplied by zero: rows after the chunk's end are another document's, and may be infinite
    both_inside = inside[:, None] & inside[None, :]
    do_e_CC, dr_e_CC = tl.where(both_inside, do_e_CC, 0.0), tl.where(both_inside, dr_e_CC, 0.0)
    kk_CC = tl.where(both_inside, kk_CC, 0.0)
    below, above = offset[:, None] > offset[None, :], offset[:, None] < offset[None, :]
    dbeta_C = tl.sum(tl.where(below | above, 0.0, dr_e_CC), 1)
    tl.store(dbeta + at + offset * H, dbeta_C.to(dbeta.dtype.element_ty), mask=inside)
    # masked before exp: above the diagonal the differences may overflow
    difference = (g[:, None] - g[None, :]) + (low[:, None] - low[None, :])
    decay_CC = tl.exp(tl.where(above, float("-inf"), difference))
    m_CC = do_e_CC * decay_CC * root
    g_CC = tl.where(below, -dr_e_CC * decay_CC, 0.0)  # M and G without their factors beta
    tl.store(to_dq + matrix, (m_CC * (rk * b)[None, :]).to(dtype))
    transposed = here * (C * C) + offset[:, None] + offset[None, :] * C
    tl.store(from_q + transposed, (m_CC * rq[:, None]).to(dtype))
    # <dP, P> and <dN, N>: their rows and columns are what the chunk's own tokens add along q^ and k^
    p_CC = tl.load(attend + matrix).to(tl.float32)
    along_p = do_e_CC * p_CC * b[None, :]
    along_n = g_CC * kk_CC * (rk * b)[:, None] * (rk * b)[None, :]
    rows_p, columns_p = tl.sum(along_p, 1), tl.sum(along_p, 0)
    rows_n, columns_n = tl.sum(along_n, 1), tl.sum(along_n, 0)
    row = sums + here * (SUM_ROWS * C) + offset
    tl.store(row + ALONG_Q * C, rows_p)
    tl.store(row + ALONG_K * C, columns_p + rows_n + columns_n)
    tl.store(row + DECAY_OWN * C, rows_p - columns_p + rows_n - columns_n)
    both_CC = g_CC + tl.trans(g_CC)
    tl.store(from_k + matrix, (both_CC * (rk * b)[None, :]).to(dtype))


@triton.jit
def _rows_inside(rows_CK, length, C: tl.constexpr):
    """A tile of rows of which those after the chunk's end, another document's, are zeros."""
    return tl.where((tl.arange(0, C) < length)[:, None], rows_CK, 0.0).to(rows_CK.dtype)


@triton.jit
def _finish_query(dq_CK, q, k, scales, to_dq, sums, dq, pid, head, start, length,
                  H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, SUM_ROWS: tl.constexpr,
                  PRECISION: tl.constexpr, PARTIAL: tl.constexpr):
    """The rest of `_query_kernel`, from do S^T. PARTIAL: rows of the tiles are another document's."""
    offset, dim = tl.arange(0, C), tl.arange(0, K)
    here = pid.to(tl.int64)
    dtype = k.dtype
    row = scales + here * (ROWS * C) + offset
    rq = tl.load(row + QUERY_NORM * C)
    dq_CK *= (tl.exp(tl.load(row + DECAY * C)) * K ** -0.5)[:, None]
    # q meets the accumulator as a product with the identity: exact, and already in the accumulator's layout
    # (a loaded tile would make the compiler move the [64, K] product through shared memory for its row sums)
    identity = tl.where(offset[:, None] == offset[None, :], 1.0, 0.0).to(dtype)
    q_CK = q.load([start, head * K])
    if PARTIAL:
        q_CK = _rows_inside(q_CK, length, C)
    unit_CK = tl.dot(identity, q_CK, input_precision=PRECISION) * rq[:, None]
    along = tl.sum(dq_CK * unit_CK, 1)
    row = sums + here * (SUM_ROWS * C) + offset
    tl.store(row + DECAY_Q * C, along)
    dq_CK -= unit_CK * (along + tl.load(row + ALONG_Q * C))[:, None]
    k_CK, m_CC = k.load([start, head * K]), to_dq.load([pid * C, 0])
    if PARTIAL:
        k_CK = _rows_inside(k_CK, length, C)
    dq_CK = dq_CK * rq[:, None] + tl.dot(m_CC, k_CK, input_precision=PRECISION) * rq[:, None]
    key_tile = (start.to(tl.int64) * H + head) * K + offset[:, None] * (H * K) + dim[None, :]
    tl.store(dq + key_tile, dq_CK.to(dtype), mask=(offset < length)[:, None])


@triton.jit
def _query_kernel(q, k, do, states, scales, to_dq, chunks, sums, dq,
                  H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                  ROWS: tl.constexpr, SUM_ROWS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    """One program a chunk and head: dq [64, K] in registers; do [64, BV], S^T [BV, K] in shared memory, STAGES deep."""
    pid = tl.program_id(0)
    chunk, head = pid // H, pid % H
    start, length = load_chunk(chunks, chunk)
    dq_CK = tl.zeros([C, K], tl.float32)
    for j in tl.range(0, V // BV, num_stages=STAGES):
        do_CV = do.load([start, head * V + j * BV])
        s_VK = states.load([pid * V + j * BV, 0])
        dq_CK = tl.dot(do_CV, s_VK, dq_CK, input_precision=PRECISION)

    if length < C:
        _finish_query(dq_CK, q, k, scales, to_dq, sums, dq, pid, head, start, length, H, K, C, ROWS, SUM_ROWS,
                      PRECISION, True)
    else:
        _finish_query(dq_CK, q, k, scales, to_dq, sums, dq, pid, head, start, length, H, K, C, ROWS, SUM_ROWS,
                      PRECISION, False)


@triton.jit
def _finish_key(dk_CK, after_CK, trace, q, k, scales, from_q, from_k, sums, log_decay, dk, dlog_decay, pid, head, start,
                length, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, SUM_ROWS: tl.constexpr,
                PRECISION: tl.constexpr, PARTIAL: tl.constexpr):
    """The rest of `_key_kernel`, from dr S^T, e dS^T and <S, dS>; PARTIAL as above."""
    offset, dim = tl.arange(0, C), tl.arange(0, K)
    inside, here = offset < length, pid.to(tl.int64)
    dtype = k.dtype
    row = scales + here * (ROWS * C) + offset
    g, b, rk = tl.load(row + DECAY * C), tl.load(row + BETA * C), tl.load(row + KEY_NORM * C)
    low = tl.load(row + DECAY_LOW * C)
    g_end = tl.load(scales + here * (ROWS * C) + DECAY * C + (C - 1))
    low_end = tl.load(scales + here * (ROWS * C) + DECAY_LOW * C + (C - 1))
    k_CK, q_CK = k.load([start, head * K]), q.load([start, head * K])
    if PARTIAL:
        k_CK, q_CK = _rows_inside(k_CK, length, C), _rows_inside(q_CK, length, C)
    from_k_CC, from_q_CC = from_k.load([pid * C, 0]), from_q.load([pid * C, 0])
    dk_CK *= (-tl.exp(g) * b)[:, None]
    after_CK *= (tl.exp((g_end - g) + (low_end - low)) * b)[:, None]
    identity = tl.where(offset[:, None] == offset[None, :], 1.0, 0.0).to(dtype)  # as in the query kernel
    unit_CK = tl.dot(identity, k_CK, input_precision=PRECISION) * rk[:, None]
    along, outgoing = tl.sum(dk_CK * unit_CK, 1), tl.sum(after_CK * unit_CK, 1)
    row = sums + here * (SUM_ROWS * C) + offset
    dg = tl.load(row + DECAY_OWN * C) + tl.load(row + DECAY_Q * C) + along - outgoing
    if PARTIAL:
        dg, outgoing = tl.where(inside, dg, 0.0), tl.where(inside, outgoing, 0.0)
    dk_CK += after_CK - unit_CK * (along + outgoing + tl.load(row + ALONG_K * C))[:, None]
    # beta multiplies the products and not their sum: two products into one accumulator would count as a chain
    dk_CK += tl.dot(from_k_CC, k_CK, input_precision=PRECISION) * b[:, None]
    dk_CK += tl.dot(from_q_CC, q_CK, input_precision=PRECISION) * b[:, None]
    at = start.to(tl.int64) * H + head
    key_tile = at * K + offset[:, None] * (H * K) + dim[None, :]
    tl.store(dk + key_tile, (dk_CK * rk[:, None]).to(dtype), mask=inside[:, None])

    boundary = tl.exp(g_end) * trace + tl.sum(outgoing, 0)
    dlog = tl.sum(tl.where(offset[:, None] > offset[None, :], 0.0, dg[None, :]), 1) + boundary
    # a decay of zero has no slope: what is left of its sum is rounding
    decay = tl.exp(tl.load(log_decay + at + offset * H, mask=inside, other=0.0).to(tl.float32))
    dlog = tl.where(decay == 0.0, 0.0, dlog)
    tl.store(dlog_decay + at + offset * H, dlog.to(dlog_decay.dtype.element_ty), mask=inside)


@triton.jit
def _key_kernel(q, k, dr, residual, states, dstates, scales, from_q, from_k, chunks, sums, log_decay, dk, dlog_decay,
                H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                ROWS: tl.constexpr, SUM_ROWS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    """One program a chunk and head: dk from before and from after [64, K] and S dS^T [BV, BV] in registers.

    Shared memory: dr, e [64, BV] and S^T, dS^T [BV, K], STAGES deep. <S, dS> is the trace of their product.
    """
    pid = tl.program_id(0)
    chunk, head = pid // H, pid % H
    start, length = load_chunk(chunks, chunk)
    col = tl.arange(0, BV)
    dk_CK, after_CK = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
    product_VV = tl.zeros([BV, BV], tl.float32)
    for j in tl.range(0, V // BV, num_stages=STAGES):
        dr_CV = dr.load([start, head * V + j * BV])
        e_CV = residual.load([start, head * V + j * BV])
        s_VK = states.load([pid * V + j * BV, 0])
        ds_VK = dstates.load([pid * V + j * BV, 0])
        dk_CK = tl.dot(dr_CV, s_VK, dk_CK, input_precision=PRECISION)
        after_CK = tl.dot(e_CV, ds_VK, after_CK, input_precision=PRECISION)
        product_VV = tl.dot(s_VK, tl.trans(ds_VK), product_VV, input_precision=PRECISION)
    trace = tl.sum(tl.sum(tl.where(col[:, None] == col[None, :], product_VV, 0.0), 1), 0)
    if length < C:
        _finish_key(dk_CK, after_CK, trace, q, k, scales, from_q, from_k, sums, log_decay, dk, dlog_decay, pid, head,
                    start, length, H, K, C, ROWS, SUM_ROWS, PRECISION, True)
    else:
        _finish_key(dk_CK, after_CK, trace, q, k, scales, from_q, from_k, sums, log_decay, dk, dlog_decay, pid, head,
                    start, length, H, K, C, ROWS, SUM_ROWS, PRECISION, False)


def chunk_gradients(*, q_MHK: Tensor, k_MHK: Tensor, do_MHV: Tensor, residual: Tensor, states: Tensor,
                    dstates: Tensor, dr: Tensor, scales: Tensor, attend: Tensor, chunks: Tensor,
                    log_decay_MH: Tensor, beta_MH: Tensor, precision: str,
                    write_dv: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_decay, dbeta, shaped and typed as the inputs; dr in place of dv = beta dr without write_dv."""
    (_, heads, value_dim), key_dim = do_MHV.shape, k_MHK.shape[2]
    dq, dk, dv = torch.empty_like(q_MHK), torch.empty_like(k_MHK), torch.empty_like(dr) if write_dv else dr
    dlog_decay, dbeta = torch.empty_like(log_decay_MH), torch.empty_like(beta_MH)
    if not chunks.shape[0]:
        return dq, dk, dv, dlog_decay, dbeta
    to_dq, from_q, from_k = (torch.empty_like(attend) for _ in range(3))
    sums = scales.new_empty(*attend.shape[:2], SUMS, 64)
    grid = (chunks.shape[0] * heads,)
    key = (key_dim, value_dim, do_MHV.element_size())

    def options(launch: Launch) -> dict[str, object]:
        return {"H": heads, "K": key_dim, "V": value_dim, "BV": launch.tile, "C": CHUNK, "ROWS": SCALES,
                "SUM_ROWS": SUMS, "PRECISION": precision, "STAGES": launch.stages, "num_warps": launch.warps,
                "maxnreg": launch.registers}

    def keys(x: Tensor, columns: int = key_dim) -> TensorDescriptor:
        return tiles_of(x, heads * key_dim, CHUNK, columns)

    def values(x: Tensor, launch: Launch) -> TensorDescriptor:
        return tiles_of(x, heads * value_dim, CHUNK, launch.tile)

    def matrices(x: Tensor) -> TensorDescriptor:
        return tiles_of(x, CHUNK, CHUNK, CHUNK)

    def states_of(x: Tensor, launch: Launch) -> TensorDescriptor:
        return tiles_of(x, key_dim, launch.tile, key_dim)

    launch = launch_of("gated_delta_matrices", *key)
    _matrix_kernel[grid](
        keys(k_MHK, 64), values(do_MHV, launch), values(dr, launch), values(residual, launch), dr, scales, attend,
        chunks, dv, dbeta, to_dq, from_q, from_k, sums, WRITE_DV=write_dv, **options(launch))
    launch = launch_of("gated_delta_dq", *key)
    _query_kernel[grid](
        keys(q_MHK), keys(k_MHK), values(do_MHV, launch), states_of(states, launch), scales, matrices(to_dq), chunks,
        sums, dq, **options(launch))
    launch = launch_of("gated_delta_dk", *key)
    _key_kernel[grid](
        keys(q_MHK), keys(k_MHK), values(dr, launch), values(residual, launch), states_of(states, launch),
        states_of(dstates, launch), scales, matrices(from_q), matrices(from_k), chunks, sums, log_decay_MH, dk,
        dlog_decay, **options(launch))
    return dq, dk, dv, dlog_decay, dbeta
