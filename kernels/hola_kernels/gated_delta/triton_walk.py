"""The two sequential passes: the state walks forward over chunks, its gradient walks back.

Both hold one tile of the state, transposed, in registers: S^T [BV, K] fp32. Every product of a step
then has a register tile on the left and a tile loaded from memory on the right (S^T k^T, x^T P^T,
x^T k, ...), so nothing computed goes through shared memory, and steps of different value
columns never meet: a program owns BV value columns of one head of one span.

A step forward, all [BV, 64] transposed:           A step back:
    rho = v - key_in (S k)                             dx = key_out (dS k) + P^T do
    e   = rho - U (beta rho)                           dr = dx - U^T (beta dx)
    o   = query_in (S q) + P (beta e)                  dS = decay dS + query_in do q - key_in beta dr k
    S   = decay S + key_out (beta e) k
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.gated_delta.triton_layout import Layout
from hola_kernels.gated_delta.triton_prepare import BETA, DECAY, KEY_IN, KEY_OUT, QUERY_IN, SCALES
from hola_kernels.triton_config import launch_of


@triton.jit
def _forward_kernel(q, k, v, scales, solve, attend, spans, state_in, state_out,
                    o, square, residual, states,
                    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                    ROWS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
                    HAS_STATE: tl.constexpr, OUTPUT: tl.constexpr, STATES: tl.constexpr, MAPS: tl.constexpr):
    """OUTPUT: writes o, the squares of the score and the last state. STATES: each chunk's incoming state and residual.

    MAPS: the affine map of the span, S_out = M S_in + E, as [E | M] [K, V + K]; columns past V start from the
    identity and see no values.
    Registers: S^T [BV, K] fp32, a 16-bit copy of one half, two [BV, 64] accumulators. Shared memory: k, q [64, K],
    U, P [64, 64], STAGES deep. Device memory: nothing but inputs and outputs.
    """
    WIDTH: tl.constexpr = V + K if MAPS else V
    TILES: tl.constexpr = WIDTH // BV
    KL: tl.constexpr = min(K, 128)  # the state is held as two halves at K = 256: one 16-bit copy at a time
    pid = tl.program_id(0)
    tile, head, span = pid % TILES, (pid // TILES) % H, pid // (TILES * H)
    first = tl.load(spans + span * 3).to(tl.int64)
    end = tl.load(spans + span * 3 + 1).to(tl.int64)
    chunk = tl.load(spans + span * 3 + 2).to(tl.int64)
    steps = tl.cdiv((end - first).to(tl.int32), C)
    place, dim, col = tl.arange(0, C), tl.arange(0, KL), tile * BV + tl.arange(0, BV)
    key_tile = place[:, None] * (H * K) + dim[None, :]
    value_tile = col[:, None] + place[None, :] * (H * V)
    matrix = place[:, None] * C + place[None, :]
    state_tile = (span * H + head).to(tl.int64) * (K * WIDTH) + col[:, None] + dim[None, :] * WIDTH  # transposes
    narrow = k.dtype.element_ty

    low_VK = tl.zeros([BV, KL], tl.float32)
    if HAS_STATE:
        low_VK += tl.load(state_in + state_tile)
    if MAPS:
        low_VK += tl.where(col[:, None] == V + dim[None, :], 1.0, 0.0)
    if K > KL:
        high_VK = tl.zeros([BV, KL], tl.float32)
        if MAPS:
            high_VK += tl.where(col[:, None] == V + KL + dim[None, :], 1.0, 0.0)
        if HAS_STATE:
            high_VK += tl.load(state_in + KL * WIDTH + state_tile)
    for i in tl.range(0, steps, num_stages=STAGES):
        at = (first + i * C) * H + head
        left = (end - first).to(tl.int32) - i * C
        here = (chunk + i) * H + head
        row = scales + here * (ROWS * C)
        key_in = tl.load(row + KEY_IN * C + place)
        key_out = tl.load(row + KEY_OUT * C + place)
        b = tl.load(row + BETA * C + place)
        decay = tl.exp(tl.load(row + DECAY * C + (C - 1)))
        inside = place[:, None] < left
        v_VC = tl.load(v + at * V + value_tile, mask=(place[None, :] < left) & (tile * BV < V), other=0.0)
        u_CC = tl.load(solve + here * (C * C) + matrix)
        state_row = here * (V * K) + col[:, None] * K + dim[None, :]

        narrow_VK = low_VK.to(narrow)
        k_low = tl.load(k + at * K + key_tile, mask=inside, other=0.0)
        sk_VC = tl.dot(narrow_VK, tl.trans(k_low), input_precision=PRECISION)
        if OUTPUT:
            q_low = tl.load(q + at * K + key_tile, mask=inside, other=0.0)
            sq_VC = tl.dot(narrow_VK, tl.trans(q_low), input_precision=PRECISION)
        if STATES:
            tl.store(states + state_row, narrow_VK)
        if K > KL:
            narrow_VK = high_VK.to(narrow)
            k_high = tl.load(k + at * K + KL + key_tile, mask=inside, other=0.0)
            sk_VC = tl.dot(narrow_VK, tl.trans(k_high), sk_VC, input_precision=PRECISION)
            if OUTPUT:
                q_high = tl.load(q + at * K + KL + key_tile, mask=inside, other=0.0)
                sq_VC = tl.dot(narrow_VK, tl.trans(q_high), sq_VC, input_precision=PRECISION)
            if STATES:
                tl.store(states + KL + state_row, narrow_VK)

        rho_VC = v_VC.to(tl.float32) - key_in[None, :] * sk_VC
        e_VC = tl.dot((rho_VC * -b[None, :]).to(narrow), tl.trans(u_CC), rho_VC, input_precision=PRECISION)
        if OUTPUT:
            x_VC = e_VC * b[None, :]
            p_CC = tl.load(attend + here * (C * C) + matrix)
            query_in = tl.load(row + QUERY_IN * C + place)
            o_VC = tl.dot(x_VC.to(narrow), tl.trans(p_CC), query_in[None, :] * sq_VC, input_precision=PRECISION)
            tl.store(o + at * V + value_tile, o_VC.to(o.dtype.element_ty), mask=place[None, :] < left)
            tl.store(square + (at + place * H) * TILES + tile, tl.sum(x_VC * x_VC, 0), mask=place < left)
        if STATES:
            tl.store(residual + at * V + value_tile, e_VC.to(narrow), mask=place[None, :] < left)
        out_VC = (e_VC * (b * key_out)[None, :]).to(narrow)
        low_VK = tl.dot(out_VC, k_low, low_VK * decay, input_precision=PRECISION)
        if K > KL:
            high_VK = tl.dot(out_VC, k_high, high_VK * decay, input_precision=PRECISION)
    if OUTPUT or MAPS:
        tl.store(state_out + state_tile, low_VK)
        if K > KL:
            tl.store(state_out + KL * WIDTH + state_tile, high_VK)


@triton.jit
def _backward_kernel(q, k, do, scales, solve, attend, spans, dstate_out, dstate_in, dr, dstates,
                     H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                     ROWS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, HAS_STATE: tl.constexpr,
                     CHUNKS: tl.constexpr):
    """Writes the gradient of the span's incoming state; with CHUNKS also dr (the gradient of a chunk's writes after
    the solve) and the gradient of each chunk's outgoing state.

    Registers: dS^T [BV, K] fp32 and its 16-bit copy, two [BV, 64]. Shared memory as in the forward pass.
    """
    TILES: tl.constexpr = V // BV
    KL: tl.constexpr = min(K, 128)
    pid = tl.program_id(0)
    tile, head, span = pid % TILES, (pid // TILES) % H, pid // (TILES * H)
    first = tl.load(spans + span * 3).to(tl.int64)
    end = tl.load(spans + span * 3 + 1).to(tl.int64)
    chunk = tl.load(spans + span * 3 + 2).to(tl.int64)
    steps = tl.cdiv((end - first).to(tl.int32), C)
    place, dim, col = tl.arange(0, C), tl.arange(0, KL), tile * BV + tl.arange(0, BV)
    key_tile = place[:, None] * (H * K) + dim[None, :]
    value_tile = col[:, None] + place[None, :] * (H * V)
    matrix = place[:, None] * C + place[None, :]
    state_tile = (span * H + head).to(tl.int64) * (K * V) + col[:, None] + dim[None, :] * V
    narrow = k.dtype.element_ty

    low_VK = tl.zeros([BV, KL], tl.float32)
    if HAS_STATE:
        low_VK += tl.load(dstate_out + state_tile)
    if K > KL:
        high_VK = tl.zeros([BV, KL], tl.float32)
        if HAS_STATE:
            high_VK += tl.load(dstate_out + KL * V + state_tile)
    for step in tl.range(0, steps, num_stages=STAGES):
        i = steps - 1 - step
        at = (first + i * C) * H + head
        left = (end - first).to(tl.int32) - i * C
        here = (chunk + i) * H + head
        row = scales + here * (ROWS * C)
        key_in = tl.load(row + KEY_IN * C + place)
        key_out = tl.load(row + KEY_OUT * C + place)
        query_in = tl.load(row + QUERY_IN * C + place)
        b = tl.load(row + BETA * C + place)
        decay = tl.exp(tl.load(row + DECAY * C + (C - 1)))
        inside = place[:, None] < left
        do_VC = tl.load(do + at * V + value_tile, mask=place[None, :] < left, other=0.0)
        u_CC = tl.load(solve + here * (C * C) + matrix)
        p_CC = tl.load(attend + here * (C * C) + matrix)
        state_row = here * (V * K) + col[:, None] * K + dim[None, :]

        narrow_VK = low_VK.to(narrow)
        k_low = tl.load(k + at * K + key_tile, mask=inside, other=0.0)
        q_low = tl.load(q + at * K + key_tile, mask=inside, other=0.0)
        sk_VC = tl.dot(narrow_VK, tl.trans(k_low), input_precision=PRECISION)
        if CHUNKS:
            tl.store(dstates + state_row, narrow_VK)
        if K > KL:
            narrow_VK = high_VK.to(narrow)
            k_high = tl.load(k + at * K + KL + key_tile, mask=inside, other=0.0)
            q_high = tl.load(q + at * K + KL + key_tile, mask=inside, other=0.0)
            sk_VC = tl.dot(narrow_VK, tl.trans(k_high), sk_VC, input_precision=PRECISION)
            if CHUNKS:
                tl.store(dstates + KL + state_row, narrow_VK)

        dx_VC = tl.dot(do_VC, p_CC, key_out[None, :] * sk_VC, input_precision=PRECISION)
        dr_VC = tl.dot((dx_VC * -b[None, :]).to(narrow), u_CC, dx_VC, input_precision=PRECISION)
        if CHUNKS:
            tl.store(dr + at * V + value_tile, dr_VC.to(narrow), mask=place[None, :] < left)
        from_o = (do_VC.to(tl.float32) * query_in[None, :]).to(narrow)
        from_r = (dr_VC * (-b * key_in)[None, :]).to(narrow)
        low_VK = tl.dot(from_o, q_low, low_VK * decay, input_precision=PRECISION)
        low_VK = tl.dot(from_r, k_low, low_VK, input_precision=PRECISION)
        if K > KL:
            high_VK = tl.dot(from_o, q_high, high_VK * decay, input_precision=PRECISION)
            high_VK = tl.dot(from_r, k_high, high_VK, input_precision=PRECISION)
    tl.store(dstate_in + state_tile, low_VK)
    if K > KL:
        tl.store(dstate_in + KL * V + state_tile, high_VK)


def walk_forward(*, q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, scales: Tensor, solve: Tensor, attend: Tensor,
                 layout: Layout, state_PHKV: Tensor | None, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """o [M, H, V], squares of the score [M, H, tiles] fp32, outgoing state of every span [P, H, K, V] fp32."""
    (tokens, heads, value_dim), key_dim = v_MHV.shape, k_MHK.shape[2]
    launch = launch_of("gated_delta_forward", key_dim, value_dim, v_MHV.element_size())
    o = torch.empty_like(v_MHV)
    square = v_MHV.new_empty(tokens, heads, value_dim // launch.tile, dtype=torch.float32)
    state_out = v_MHV.new_empty(layout.span_count, heads, key_dim, value_dim, dtype=torch.float32)
    _forward_kernel[(layout.span_count * heads * (value_dim // launch.tile),)](
        q_MHK, k_MHK, v_MHV, scales, solve, attend, layout.spans, state_PHKV, state_out, o, square, None, None,
        H=heads, K=key_dim, V=value_dim, BV=launch.tile, C=64, ROWS=SCALES, PRECISION=precision, STAGES=launch.stages,
        HAS_STATE=state_PHKV is not None, OUTPUT=True, STATES=False, MAPS=False, num_warps=launch.warps,
        maxnreg=launch.registers)
    return o, square, state_out


def recompute_states(*, k_MHK: Tensor, v_MHV: Tensor, scales: Tensor, solve: Tensor, layout: Layout,
                     state_PHKV: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
    """Incoming state of every chunk, transposed [U, H, V, K], and the residuals e [M, H, V], both in v's dtype."""
    (_, heads, value_dim), key_dim = v_MHV.shape, k_MHK.shape[2]
    launch = launch_of("gated_delta_states", key_dim, value_dim, v_MHV.element_size())
    residual = torch.empty_like(v_MHV)
    states = v_MHV.new_empty(layout.chunk_count, heads, value_dim, key_dim)
    _forward_kernel[(layout.span_count * heads * (value_dim // launch.tile),)](
        None, k_MHK, v_MHV, scales, solve, None, layout.spans, state_PHKV, None, None, None, residual, states,
        H=heads, K=key_dim, V=value_dim, BV=launch.tile, C=64, ROWS=SCALES, PRECISION=precision, STAGES=launch.stages,
        HAS_STATE=state_PHKV is not None, OUTPUT=False, STATES=True, MAPS=False, num_warps=launch.warps,
        maxnreg=launch.registers)
    return states, residual


def span_maps(*, k_MHK: Tensor, v_MHV: Tensor, scales: Tensor, solve: Tensor, layout: Layout,
              precision: str) -> Tensor:
    """What each span does to the state that enters it, S_out = M S_in + E: [E | M] [P, H, K, V + K] fp32."""
    (_, heads, value_dim), key_dim = v_MHV.shape, k_MHK.shape[2]
    launch = launch_of("gated_delta_states", key_dim, value_dim, v_MHV.element_size())
    tile = min(launch.tile, key_dim)
    maps = v_MHV.new_empty(layout.span_count, heads, key_dim, value_dim + key_dim, dtype=torch.float32)
    _forward_kernel[(layout.span_count * heads * ((value_dim + key_dim) // tile),)](
        None, k_MHK, v_MHV, scales, solve, None, layout.spans, None, maps, None, None, None, None,
        H=heads, K=key_dim, V=value_dim, BV=tile, C=64, ROWS=SCALES, PRECISION=precision, STAGES=launch.stages,
        HAS_STATE=False, OUTPUT=False, STATES=False, MAPS=True, num_warps=launch.warps if tile == launch.tile else 4)
    return maps


def walk_backward(*, q_MHK: Tensor, k_MHK: Tensor, do_MHV: Tensor, scales: Tensor, solve: Tensor, attend: Tensor,
                  layout: Layout, dstate_PHKV: Tensor | None, precision: str,
                  every_chunk: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """dr [M, H, V], gradient of every chunk's outgoing state, transposed [U, H, V, K], of every span's incoming one.

    Without every_chunk only the last, [P, H, K, V] fp32.
    """
    (_, heads, value_dim), key_dim = do_MHV.shape, k_MHK.shape[2]
    launch = launch_of("gated_delta_backward", key_dim, value_dim, do_MHV.element_size())
    dr = torch.empty_like(do_MHV) if every_chunk else None
    dstates = do_MHV.new_empty(layout.chunk_count, heads, value_dim, key_dim) if every_chunk else None
    dstate_in = do_MHV.new_empty(layout.span_count, heads, key_dim, value_dim, dtype=torch.float32)
    _backward_kernel[(layout.span_count * heads * (value_dim // launch.tile),)](
        q_MHK, k_MHK, do_MHV, scales, solve, attend, layout.spans, dstate_PHKV, dstate_in, dr, dstates,
        H=heads, K=key_dim, V=value_dim, BV=launch.tile, C=64, ROWS=SCALES, PRECISION=precision, STAGES=launch.stages,
        HAS_STATE=dstate_PHKV is not None, CHUNKS=every_chunk, num_warps=launch.warps,
        maxnreg=launch.registers)
    return dr, dstates, dstate_in
