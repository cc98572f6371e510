"""Decay and write strength in one launch forward and two backward; in torch they are eight and some sixteen.

A program owns a tile of tokens with all their heads; in the backward pass it loops over several tiles to sum the
gradients of A_log and dt_bias in registers, and the programs' sums are then added up: deterministic. Nothing is saved
but what is returned, which the state keeps as well: with s = -log_decay / exp(A_log), the softplus, its slope is
1 - exp(-s). So the projection need not be saved for it.
Tokens may lie at two strides (rows of a batch, tokens of a row): nothing is copied where a [B, S, W] is transposed.
For 65,536 tokens of 4 heads and 64 columns in bf16: forward 4 MB, backward 13 MB, 3 us at 4.3 TB/s; launches count.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.integers import cdiv, next_power_of_2
from hola_kernels.operation import first_order
from hola_kernels.triton_rows import GradBuffer, contiguous_columns, gradient_rows
from hola_kernels.triton_sums import sum_parts

NUMBERS, MOST_TOKENS = 1024, 128  # of a tile; more tokens' zeros would not fit in registers of 128 threads
PROGRAMS = 528  # of the backward pass: four for each of an H200's 132 multiprocessors


@triton.jit
def _log_one_more(u):
    """log(1 + u) of 0 <= u <= 1 to float32's last digits: what 1 + u rounds away is made up for."""
    w = 1.0 + u
    lost = w == 1.0
    return tl.where(lost, u, tl.log(w) * (u / tl.where(lost, 1.0, w - 1.0)))


@triton.jit
def _one_less_exp(s):
    """1 - exp(-s) of s >= 0, the same way: exp's own error does not count where s is small."""
    u = tl.exp(-s)
    near = (u < 1.0) & (s < 1.0)
    made_up = (1.0 - u) * (s / tl.where(near, -tl.log(u), 1.0))
    return tl.where(u == 1.0, s, tl.where(near, made_up, 1.0 - u))


@triton.jit
def _offset(token, row_tokens, row_stride, token_stride):
    """Where a token begins, in 64 bits, of tokens [rows, row_tokens] at two strides."""
    return (token // row_tokens).to(tl.int64) * row_stride + (token % row_tokens).to(tl.int64) * token_stride


@triton.jit
def _gates_forward_kernel(x_ptr, A_log_ptr, dt_bias_ptr, log_decay_ptr, beta_ptr, total, row_tokens, row_stride,
                          token_stride, H: tl.constexpr, DECAY: tl.constexpr, RANGE: tl.constexpr,
                          TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """log_decay, beta [M, H] of M = total tokens; [TOKENS, HEADS] in registers."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    h = tl.arange(0, HEADS)
    mask = (token < total)[:, None] & (h < H)[None, :]
    x = x_ptr + _offset(token, row_tokens, row_stride, token_stride)[:, None] + h[None, :]
    out = token.to(tl.int64)[:, None] * H + h[None, :]
    beta = RANGE * tl.sigmoid(tl.load(x, mask=mask, other=0.0).to(tl.float32))
    tl.store(beta_ptr + out, beta, mask=mask)
    if DECAY:
        rate = tl.exp(tl.load(A_log_ptr + h, mask=h < H, other=0.0).to(tl.float32))
        bias = tl.load(dt_bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        z = tl.load(x + H, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        softplus = tl.maximum(z, 0.0) + _log_one_more(tl.exp(-tl.abs(z)))
        tl.store(log_decay_ptr + out, -rate[None, :] * softplus, mask=mask)
    else:
        tl.store(log_decay_ptr + out, tl.zeros((TOKENS, HEADS), tl.float32), mask=mask)


@triton.jit
def _gates_backward_kernel(log_decay_ptr, beta_ptr, dlog_decay_ptr, dbeta_ptr, A_log_ptr, dx_ptr, part_ptr, total,
                           row_tokens, row_stride, token_stride, H: tl.constexpr, W: tl.constexpr,
                           DECAY: tl.constexpr, RANGE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
                           SPARE: tl.constexpr):
    """dx [M, W], part [programs, 2, H] (of A_log, of dt_bias): with z = a + dt_bias and s = softplus(z),

    db = dbeta beta (1 - beta / RANGE)    da = dz = -dlog_decay exp(A_log) (1 - exp(-s))
    dA_log = sum dlog_decay log_decay    ddt_bias = sum dz
    """
    h = tl.arange(0, HEADS)
    used: tl.constexpr = 2 * H if DECAY else H
    if DECAY:
        rate = tl.exp(tl.load(A_log_ptr + h, mask=h < H, other=0.0).to(tl.float32))[None, :]
        dA_log = tl.zeros((TOKENS, HEADS), tl.float32)  # summed over tokens once, at the end
        ddt_bias = tl.zeros((TOKENS, HEADS), tl.float32)
    for first in tl.range(tl.program_id(0) * TOKENS, total, tl.num_programs(0) * TOKENS):
        token = first + tl.arange(0, TOKENS)
        mask = (token < total)[:, None] & (h < H)[None, :]
        begin = dx_ptr + _offset(token, row_tokens, row_stride, token_stride)[:, None]
        at = token.to(tl.int64)[:, None] * H + h[None, :]
        beta = tl.load(beta_ptr + at, mask=mask, other=0.0)
        dbeta = tl.load(dbeta_ptr + at, mask=mask, other=0.0)
        db = dbeta * (1.0 - beta * (1.0 / RANGE)) * beta
        tl.store(begin + h[None, :], db.to(dx_ptr.dtype.element_ty), mask=mask)
        if DECAY:
            log_decay = tl.load(log_decay_ptr + at, mask=mask, other=0.0)
            dlog_decay = tl.load(dlog_decay_ptr + at, mask=mask, other=0.0)
            # a rate of zero makes no decay, and 0 / 0 would make NaN
            dz = -dlog_decay * rate * _one_less_exp(-log_decay / tl.maximum(rate, 1e-37))
            dA_log += dlog_decay * log_decay
            ddt_bias += dz
            tl.store(begin + H + h[None, :], dz.to(dx_ptr.dtype.element_ty), mask=mask)
        if used < W:
            column = tl.arange(0, SPARE)[None, :]
            zeros = tl.zeros((TOKENS, SPARE), dx_ptr.dtype.element_ty)
            tl.store(begin + used + column, zeros, mask=(token < total)[:, None] & (column < W - used))
    if DECAY:
        part = part_ptr + tl.program_id(0) * 2 * H + h
        tl.store(part, tl.sum(dA_log, 0), mask=h < H)
        tl.store(part + H, tl.sum(ddt_bias, 0), mask=h < H)


class DecayAndStrength(torch.autograd.Function):
    """x [N, T, W], a token's columns contiguous -> log_decay, beta [N, T, H]; saves these and A_log only."""

    @staticmethod
    def forward(ctx: Any, x_NTW: Tensor, heads: int, A_log_H: Tensor | None, dt_bias_H: Tensor | None,
                beta_range: int, dx_buffer: GradBuffer | None) -> tuple[Tensor, Tensor]:
        rows, tokens, _ = x_NTW.shape
        log_decay = torch.empty(rows, tokens, heads, dtype=torch.float32, device=x_NTW.device)
        beta = torch.empty(log_decay.shape, dtype=torch.float32, device=x_NTW.device)
        tile = _tile(heads)
        _gates_forward_kernel[(cdiv(rows * tokens, tile["TOKENS"]),)](
            x_NTW, A_log_H, dt_bias_H, log_decay, beta, rows * tokens, tokens, *x_NTW.stride()[:2], H=heads,
            DECAY=A_log_H is not None, RANGE=beta_range, **tile, num_warps=4)
        ctx.save_for_backward(log_decay, beta, A_log_H)
        ctx.beta_range = beta_range
        ctx.like, ctx.dx_buffer = torch.empty_like(x_NTW, device="meta"), dx_buffer  # shape and dtype, no memory
        ctx.bias_dtype = None if dt_bias_H is None else dt_bias_H.dtype
        ctx.set_materialize_grads(False)
        if A_log_H is None:
            ctx.mark_non_differentiable(log_decay)
        return log_decay, beta

    @staticmethod
    @first_order
    def backward(ctx: Any, dlog_decay: Tensor | None, dbeta: Tensor | None) -> tuple[Tensor | None, ...]:
        log_decay, beta, A_log_H = ctx.saved_tensors
        decay, (rows, tokens, width), heads = A_log_H is not None, ctx.like.shape, beta.shape[-1]
        dlog_decay, dbeta = _given(dlog_decay, log_decay) if decay else None, _given(dbeta, beta)
        wanted = ctx.needs_input_grad[0]  # else nobody would take the buffer back
        dx_NTW = gradient_rows(ctx.dx_buffer if wanted else None, _rows, ctx.like, beta.device)
        tile = _tile(heads)
        programs = min(cdiv(rows * tokens, tile["TOKENS"]), PROGRAMS)
        parts = beta.new_empty(programs, 2, heads) if decay else None
        _gates_backward_kernel[(programs,)](
            log_decay, beta, dlog_decay, dbeta, A_log_H, dx_NTW, parts, rows * tokens, tokens, *dx_NTW.stride()[:2],
            H=heads, W=width, DECAY=decay, RANGE=ctx.beta_range, SPARE=next_power_of_2(width), **tile, num_warps=4)
        if not decay:
            return dx_NTW if wanted else None, None, None, None, None, None
        dA_log, ddt_bias = sum_parts(parts, torch.float32)
        return dx_NTW if wanted else None, None, dA_log.to(A_log_H.dtype), ddt_bias.to(ctx.bias_dtype), None, None


def decay_and_strength_triton(x: Tensor, heads: int, A_log_H: Tensor | None, dt_bias_H: Tensor | None,
                              beta_range: int = 1, dx_buffer: GradBuffer | None = None) -> tuple[Tensor, Tensor]:
    """Same contract as `decay_and_strength_reference`; dx_buffer as in `decay_and_strength`."""
    if A_log_H is not None:
        A_log_H, dt_bias_H = A_log_H.contiguous(), dt_bias_H.contiguous()
    rows = _rows(contiguous_columns(x))
    log_decay, beta = DecayAndStrength.apply(rows, heads, A_log_H, dt_bias_H, beta_range, dx_buffer)
    shape = (*x.shape[:-1], heads)
    return log_decay.view(shape), beta.view(shape)


def _rows(x: Tensor) -> Tensor:
    """[..., W] -> [N, T, W], a copy only if more than two leading axes are not evenly spaced."""
    return x.flatten(0, -3) if x.ndim > 2 else x.reshape(1, -1, x.shape[-1])


def _given(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


def _tile(heads: int) -> dict[str, int]:
    padded = next_power_of_2(heads)
    return {"TOKENS": min(MOST_TOKENS, max(1, NUMBERS // padded)), "HEADS": padded}
