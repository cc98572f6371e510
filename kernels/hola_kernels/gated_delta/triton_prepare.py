"""What each chunk needs before the state comes: scales of its tokens, its solve and its attention.

With unit k^ = rk k and q^ = rq q, g the log decay summed from the chunk's first token, and
k^_i.k^_j exp(g_i - g_j) below the diagonal called N_ij, the residuals of a chunk are

    e = (I + N diag(beta))^-1 rho,  rho = v - exp(g) k^ S_in        that is   e = rho - U (beta rho)
    U = N (I + diag(beta) N)^-1,   strictly lower triangular and free of any division by beta

and the same U gives the backward solve: dr = dx - U^T (beta dx). U is built in two levels:
forward substitution in the four 16 x 16 diagonal blocks (stable for beta near 1 and equal keys,
where a series of powers of N loses every digit), then the blocks are joined by the four-term
series of a block matrix that is nilpotent after four steps, whose terms stay small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.backend import interpreted
from hola_kernels.descriptors import tiles_of
from hola_kernels.gated_delta import torch_chunked
from hola_kernels.gated_delta.triton_tables import load_chunk
from hola_kernels.norms import L2_EPS, RMS_EPS
from hola_kernels.triton_config import launch_of

# of the products that join the blocks, for 16-bit and for fp32 inputs; plain tf32 loses half of the 16-bit digits
# where keys are nearly equal and beta is near 1
SOLVE_PRECISION = {2: "bf16x3", 4: "tf32x3"}

# rows of the scales buffer [U, H, SCALES, 64], zero past the end of a chunk
SCALES = 8
KEY_IN = tl.constexpr(0)     # exp(g) rk: k into the incoming state
KEY_OUT = tl.constexpr(1)    # exp(g_end - g) rk: k into the outgoing state
QUERY_IN = tl.constexpr(2)   # K^-1/2 exp(g) rq
BETA = tl.constexpr(3)
DECAY = tl.constexpr(4)      # g, held at its last value past the end
KEY_NORM = tl.constexpr(5)   # rk
QUERY_NORM = tl.constexpr(6)  # rq
DECAY_LOW = tl.constexpr(7)  # what rounding took from g where a chunk forgets much, else zero

FORGOTTEN = tl.constexpr(torch_chunked.FORGOTTEN)
HARD = tl.constexpr(torch_chunked.HARD)
GRID = tl.constexpr(torch_chunked.GRID)


@dataclass(frozen=True)
class ReadNorm:
    """Room [M, H] float32 for 1 / sqrt(mean |k|^2 + eps) of every key, which cost nothing beside |k|^2."""

    key_norm_MH: Tensor
    mean: float


@triton.jit
def _cumulative_decay(log_decay):
    """(g, low) as in `torch_chunked.cumulative_decay`."""
    clamped = tl.where(log_decay < FORGOTTEN, FORGOTTEN, log_decay)
    plain = tl.cumsum(clamped, 0)
    coarse = tl.floor(clamped * GRID + 0.5) / GRID
    high, fine = tl.cumsum(coarse, 0), tl.cumsum(clamped - coarse, 0)
    total = high + fine
    hard = tl.min(plain, 0) < HARD
    return tl.where(hard, total, plain), tl.where(hard, (high - total) + fine, 0.0)


@triton.jit
def _prepare_kernel(q, k, log_decay, beta, chunks, scales, solve, attend, read_norm, read_mean,
                    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
                    PART: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
                    READ_NORM: tl.constexpr, READ_EPS: tl.constexpr):
    """One program a chunk and head. The [64, 64] matrices live in registers, fp32; k and q pass in parts [64, PART]."""
    pid = tl.program_id(0)
    chunk, head = pid // H, pid % H
    start, length = load_chunk(chunks, chunk)
    offset = tl.arange(0, C)
    inside = offset < length
    at = start.to(tl.int64) * H + head + offset * H
    g, low = _cumulative_decay(tl.load(log_decay + at, mask=inside, other=0.0).to(tl.float32))
    b = tl.load(beta + at, mask=inside, other=0.0).to(tl.float32)

    g_end = tl.sum(tl.where(offset == C - 1, g, 0.0), 0)
    low_end = tl.sum(tl.where(offset == C - 1, low, 0.0), 0)
    kk_CC, qk_CC, qq_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for part in tl.range(0, K // PART, num_stages=STAGES):
        # products only: Triton 3.6 and 3.7 overwrite a tile too early that a pipelined loop both multiplies and
        # reads into registers, so the lengths come from the diagonals as well
        k_CP = k.load([start, head * K + part * PART])
        q_CP = q.load([start, head * K + part * PART])
        kk_CC = tl.dot(k_CP, tl.trans(k_CP), kk_CC, input_precision=PRECISION)
        qk_CC = tl.dot(q_CP, tl.trans(k_CP), qk_CC, input_precision=PRECISION)
        qq_CC = tl.dot(q_CP, tl.trans(q_CP), qq_CC, input_precision=PRECISION)
    same = offset[:, None] == offset[None, :]
    k_square, q_square = tl.sum(tl.where(same, kk_CC, 0.0), 1), tl.sum(tl.where(same, qq_CC, 0.0), 1)
    rk = tl.where(inside, 1.0 / tl.sqrt(k_square + EPS), 0.0)
    rq = tl.where(inside, 1.0 / tl.sqrt(q_square + EPS), 0.0)
    if READ_NORM:  # what cache attention divides keys by
        tl.store(read_norm + at, tl.rsqrt(k_square * read_mean + READ_EPS), mask=inside)
    root: tl.constexpr = K ** -0.5
    row = scales + pid.to(tl.int64) * (ROWS * C) + offset
    tl.store(row + KEY_IN * C, tl.exp(g) * rk)
    tl.store(row + KEY_OUT * C, tl.exp((g_end - g) + (low_end - low)) * rk)
    tl.store(row + QUERY_IN * C, tl.exp(g) * rq * root)
    tl.store(row + BETA * C, b)
    tl.store(row + DECAY * C, g)
    tl.store(row + KEY_NORM * C, rk)
    tl.store(row + QUERY_NORM * C, rq)
    tl.store(row + DECAY_LOW * C, low)

    # masked before exp: above the diagonal g_i - g_j is positive and may overflow
    difference = (g[:, None] - g[None, :]) + (low[:, None] - low[None, :])
    difference = tl.where(offset[:, None] >= offset[None, :], difference, float("-inf"))
    decay_CC = tl.exp(difference) * rk[None, :]
    matrix = pid.to(tl.int64) * (C * C) + offset[:, None] * C + offset[None, :]
    # chosen, not multiplied by zero: rows after the segment's end are another document's, and may be infinite
    seen_CC = (offset[:, None] >= offset[None, :]) & inside[:, None]
    attend_CC = tl.where(seen_CC, qk_CC * decay_CC * (rq * root)[:, None], 0.0)
    tl.store(attend + matrix, attend_CC.to(attend.dtype.element_ty))
    n_CC = kk_CC * decay_CC * rk[:, None]
    n_CC = tl.where((offset[:, None] > offset[None, :]) & inside[:, None], n_CC, 0.0)
    tl.store(solve + matrix, _solve(n_CC, b, C, SOLVE).to(solve.dtype.element_ty))


@triton.jit
def _solve(n_CC, b, C: tl.constexpr, PRECISION: tl.constexpr):
    """U = N (I + diag(b) N)^-1 of a strictly lower triangular N, fp32."""
    D: tl.constexpr = 16
    u_CC = _solve_blocks(n_CC, b, C)
    # (I + N b) U = N with N = (blocks on the diagonal) + L: (I + J b) U = U_diagonal + J, J = (I - U_diagonal b) L
    of = tl.arange(0, C) // D
    l_CC = tl.where(of[:, None] > of[None, :], n_CC, 0.0)
    j_CC = l_CC - tl.dot(u_CC * b[None, :], l_CC, input_precision=PRECISION)
    step_CC = j_CC * b[None, :]
    right_CC = u_CC + j_CC
    twice_CC = tl.dot(step_CC, step_CC, input_precision=PRECISION)
    even_CC = right_CC + tl.dot(twice_CC, right_CC, input_precision=PRECISION)
    return even_CC - tl.dot(step_CC, even_CC, input_precision=PRECISION)


@triton.jit
def _solve_blocks(n_CC, b, C: tl.constexpr):
    """[C, C]: the same U of each 16 x 16 diagonal block of N by itself, zero elsewhere.

    Forward substitution in 8 x 8 blocks, one row at a time (u_i = n_i - sum_j<i n_ij b_j u_j), seven dependent steps;
    then two neighbours are joined exactly: with blocks 1 and 2, U21 = (I - U22 b2) N21 (I - b1 U11).
    """
    D: tl.constexpr = 8
    B: tl.constexpr = C // D
    block, within = tl.arange(0, B), tl.arange(0, D)
    same = block[:, None, None, None] == block[None, None, :, None]
    n_BDBD = tl.reshape(n_CC, (B, D, B, D))
    n_BDD = tl.sum(tl.where(same, n_BDBD, 0.0), 2)
    b_BD = tl.reshape(b, (B, D))
    u_BDD = n_BDD
    for i in range(1, D):
        is_i = (within == i)[None, :, None]
        n_i = tl.sum(tl.where(is_i, n_BDD, 0.0), 1)
        seen = tl.sum((n_i * b_BD)[:, :, None] * u_BDD, 1)
        u_BDD = tl.where(is_i, (n_i - seen)[:, None, :], u_BDD)
    # [B, D, D]: the block to the left of an odd block; zero for even ones
    left = (block[:, None, None, None] == block[None, None, :, None] + 1) & (block % 2 == 1)[:, None, None, None]
    l_BDD = tl.sum(tl.where(left, n_BDBD, 0.0), 2)
    l_BDD -= tl.sum((u_BDD * b_BD[:, None, :])[:, :, :, None] * l_BDD[:, None, :, :], 2)
    before = block[:, None, None, None] == block[None, :, None, None] + 1   # [B, B', 1, 1]: B' comes before B
    bu_BDD = tl.sum(tl.where(before, (b_BD[:, :, None] * u_BDD)[None, :, :, :], 0.0), 1)
    l_BDD -= tl.sum(l_BDD[:, :, :, None] * bu_BDD[:, None, :, :], 2)
    u_BDBD = tl.where(same, u_BDD[:, :, None, :], 0.0) + tl.where(left, l_BDD[:, :, None, :], 0.0)
    return tl.reshape(u_BDBD, (C, C))


def prepare(*, q_MHK: Tensor, k_MHK: Tensor, log_decay_MH: Tensor, beta_MH: Tensor, chunks: Tensor,
            precision: str, read_norm: ReadNorm | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """scales [U, H, 8, 64] fp32, solve U and attention P [U, H, 64, 64] in q's dtype, for all chunks at once.

    read_norm: the keys' norms of cache attention are wanted too.
    """
    heads, key_dim = q_MHK.shape[1:]
    count, size = chunks.shape[0], 64
    scales = q_MHK.new_empty(count, heads, SCALES, size, dtype=torch.float32)
    solve = q_MHK.new_empty(count, heads, size, size)
    attend = solve.new_empty(solve.shape)
    launch = launch_of("gated_delta_prepare", key_dim, q_MHK.element_size())
    # the interpreter knows no bf16x3
    solve_precision = "ieee" if interpreted() else SOLVE_PRECISION[q_MHK.element_size()]
    if count:
        _prepare_kernel[(count * heads,)](
            tiles_of(q_MHK, heads * key_dim, size, launch.tile), tiles_of(k_MHK, heads * key_dim, size, launch.tile),
            log_decay_MH, beta_MH, chunks, scales, solve, attend, read_norm.key_norm_MH if read_norm else scales,
            read_norm.mean if read_norm else 0.0, H=heads, K=key_dim, C=size,
            ROWS=SCALES, EPS=L2_EPS, PART=launch.tile, STAGES=launch.stages, PRECISION=precision, SOLVE=solve_precision,
            READ_NORM=read_norm is not None, READ_EPS=RMS_EPS, num_warps=launch.warps, maxnreg=launch.registers)
    return scales, solve, attend
