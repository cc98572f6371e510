"""The chunk state pass and its backward: the state goes over chunks in order, its gradient in reverse.

Both hold one tile of the state, transposed, in registers: S^T [BV, K] fp32. Every product of a step
then has a register tile on the left and a tile loaded from memory on the right (S^T k^T, x^T P^T,
x^T k, ...), so nothing computed goes through shared memory, and steps of different value
columns never meet: a program owns BV value columns of one head of one span. Tiles come by
descriptors, whole: rows after a segment's end are another's. Their scales are zero, and in a segment's last tile, a
step of its own, they are made zeros, because zero times an infinite number is not zero.

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
from triton.tools.tensor_descriptor import TensorDescriptor

from hola_kernels.descriptors import tiles_of
from hola_kernels.gated_delta.triton_layout import CHUNK, Layout
from hola_kernels.gated_delta.triton_prepare import BETA, DECAY, KEY_IN, KEY_OUT, QUERY_IN, SCALES
from hola_kernels.gated_delta.triton_tables import load_span
from hola_kernels.triton_config import Launch, launch_of


@triton.jit
def _rows_inside(rows_CK, left, C: tl.constexpr):
    """A tile of rows of which those after the segment's end are zeros: zero scales would make NaN of an infinite
    neighbour."""
    return tl.where((tl.arange(0, C) < left)[:, None], rows_CK, 0.0).to(rows_CK.dtype)


@triton.jit
def _state_times_keys(low_VK, high_VK, k, row, head, left, states, here, tile, K: tl.constexpr, V: tl.constexpr,
                      BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, STORED: tl.constexpr,
                      PARTIAL: tl.constexpr):
    """(S^T k [BV, 64], the halves of the chunk's keys) of the state's halves, which are STORED as they are rounded."""
    KL: tl.constexpr = min(K, 128)
    k_low = k.load([row, head * K])
    if PARTIAL:
        k_low = _rows_inside(k_low, left, C)
    k_high = k_low
    rounded_VK = low_VK.to(k.dtype)
    sk_VC = tl.dot(rounded_VK, tl.trans(k_low), input_precision=PRECISION)
    if STORED:
        states.store([here * V + tile * BV, 0], rounded_VK)
    if K > KL:
        k_high = k.load([row, head * K + KL])
        if PARTIAL:
            k_high = _rows_inside(k_high, left, C)
        rounded_VK = high_VK.to(k.dtype)
        sk_VC = tl.dot(rounded_VK, tl.trans(k_high), sk_VC, input_precision=PRECISION)
        if STORED:
            states.store([here * V + tile * BV, KL], rounded_VK)
    return sk_VC, k_low, k_high


@triton.jit
def _forward_step(low_VK, high_VK, i, q, k, v, solve, attend, scale_rows, scales, one, o, square, residual, states,
                  first, end, chunk, head, tile,
                  H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                  ROWS: tl.constexpr, PRECISION: tl.constexpr, OUTPUT: tl.constexpr, STATES: tl.constexpr,
                  MAPS: tl.constexpr, PARTIAL: tl.constexpr):
    """The state's halves after chunk number i of the span (high is low up to K = 128). PARTIAL: its last tile holds
    tokens of the next segment."""
    TILES: tl.constexpr = (V + K if MAPS else V) // BV
    KL: tl.constexpr = min(K, 128)
    offset, col = tl.arange(0, C), tile * BV + tl.arange(0, BV)
    dtype = k.dtype
    row, here = first + i * C, (chunk + i) * H + head
    left = end - row  # rows past it belong to another segment
    v_CV = v.load([row, head * V + tile * BV])
    u_CC = solve.load([here * C, 0])
    key_in = scale_rows.load([here * ROWS + KEY_IN, 0])
    b = scale_rows.load([here * ROWS + BETA, 0])
    decay = tl.exp(tl.load(scales + here.to(tl.int64) * (ROWS * C) + (DECAY * C + C - 1)))

    sk_VC, k_low, k_high = _state_times_keys(low_VK, high_VK, k, row, head, left, states, here, tile, K, V, BV, C,
                                             PRECISION, STATES, PARTIAL)
    rho_VC = tl.trans(v_CV).to(tl.float32)
    if MAPS:
        rho_VC = tl.where(tile * BV < V, rho_VC, 0.0)
    if PARTIAL:
        rho_VC = tl.where(offset[None, :] < left, rho_VC, 0.0)
    rho_VC -= key_in * sk_VC
    e_VC = tl.dot((rho_VC * -b).to(dtype), tl.trans(u_CC), rho_VC, input_precision=PRECISION)
    value_tile = (row.to(tl.int64) * H + head) * V + col[:, None] + offset[None, :] * (H * V)
    if STATES:
        tl.store(residual + value_tile, e_VC.to(dtype), mask=offset[None, :] < left)
    x_VC = e_VC * b
    out_VC = (x_VC * scale_rows.load([here * ROWS + KEY_OUT, 0])).to(dtype)
    if OUTPUT:
        # times one (a number the compiler does not know): the 16-bit state is made a second time instead of being
        # kept in registers since S k, and no product is left running into the next step, for which ptxas would
        # make every product of the loop wait for the one before
        q_low = q.load([row, head * K])
        sq_VC = tl.dot((low_VK * one).to(dtype), tl.trans(q_low), input_precision=PRECISION)
        if K > KL:
            q_high = q.load([row, head * K + KL])
            sq_VC = tl.dot((high_VK * one).to(dtype), tl.trans(q_high), sq_VC, input_precision=PRECISION)
        p_CC = attend.load([here * C, 0])
        query_in = scale_rows.load([here * ROWS + QUERY_IN, 0])
        o_VC = tl.dot(x_VC.to(dtype), tl.trans(p_CC), query_in * sq_VC, input_precision=PRECISION)
        tl.store(o + value_tile, o_VC.to(dtype), mask=offset[None, :] < left)
        at = (row + offset).to(tl.int64) * H + head
        tl.store(square + at * TILES + tile, tl.sum(x_VC * x_VC, 0), mask=offset < left)
    low_VK = tl.dot(out_VC, k_low, low_VK * decay, input_precision=PRECISION)
    if K > KL:
        high_VK = tl.dot(out_VC, k_high, high_VK * decay, input_precision=PRECISION)
        if OUTPUT:
            high_VK *= one
    if K > KL:
        return low_VK, high_VK
    else:
        return low_VK, low_VK


@triton.jit
def _forward_kernel(q, k, v, solve, attend, scale_rows, scales, spans, one, state_in, state_out,
                    o, square, residual, states, M_T,
                    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                    ROWS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
                    HAS_STATE: tl.constexpr, OUTPUT: tl.constexpr, STATES: tl.constexpr, MAPS: tl.constexpr):
    """OUTPUT: writes o, the squares of the score and the last state. STATES: each chunk's incoming state and residual.

    MAPS: the affine map of the span, S_out = M S_in + E, as [E | M] [K, V + K], and M^T; columns past V start from the
    identity and see no values.
    Registers: S^T [BV, K] fp32, a 16-bit copy of it, one [BV, 64] accumulator. Shared memory: k, q [64, K],
    v [64, BV], U, P [64, 64], STAGES deep, filled by tensor descriptors. Device memory: nothing but inputs and outputs.
    """
    WIDTH: tl.constexpr = V + K if MAPS else V
    TILES: tl.constexpr = WIDTH // BV
    KL: tl.constexpr = min(K, 128)  # the state is held as two halves at K = 256
    pid = tl.program_id(0)
    tile, head, span = pid % TILES, (pid // TILES) % H, pid // (TILES * H)
    first, end, chunk = load_span(spans, span)
    whole = (end - first) // C
    dim, col = tl.arange(0, KL), tile * BV + tl.arange(0, BV)
    state_tile = (span * H + head).to(tl.int64) * (K * WIDTH) + col[:, None] + dim[None, :] * WIDTH  # transposes

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
    for i in tl.range(0, whole, num_stages=STAGES):
        if K > KL:
            low_VK, high_VK = _forward_step(
                low_VK, high_VK, i, q, k, v, solve, attend, scale_rows, scales, one, o, square, residual, states,
                first, end, chunk, head, tile, H, K, V, BV, C, ROWS, PRECISION, OUTPUT, STATES, MAPS, False)
        else:
            low_VK, _ = _forward_step(
                low_VK, low_VK, i, q, k, v, solve, attend, scale_rows, scales, one, o, square, residual, states,
                first, end, chunk, head, tile, H, K, V, BV, C, ROWS, PRECISION, OUTPUT, STATES, MAPS, False)
    if whole * C < end - first:  # by itself: tiles that go into registers stay out of the loop
        if K > KL:
            low_VK, high_VK = _forward_step(
                low_VK, high_VK, whole, q, k, v, solve, attend, scale_rows, scales, one, o, square, residual, states,
                first, end, chunk, head, tile, H, K, V, BV, C, ROWS, PRECISION, OUTPUT, STATES, MAPS, True)
        else:
            low_VK, _ = _forward_step(
                low_VK, low_VK, whole, q, k, v, solve, attend, scale_rows, scales, one, o, square, residual, states,
                first, end, chunk, head, tile, H, K, V, BV, C, ROWS, PRECISION, OUTPUT, STATES, MAPS, True)
    if MAPS and tile * BV >= V:
        transposed_tile = (span * H + head).to(tl.int64) * (K * K) + (col - V)[:, None] * K + dim[None, :]
        tl.store(M_T + transposed_tile, low_VK)
        if K > KL:
            tl.store(M_T + KL + transposed_tile, high_VK)
    if OUTPUT or MAPS:
        tl.store(state_out + state_tile, low_VK)
        if K > KL:
            tl.store(state_out + KL * WIDTH + state_tile, high_VK)


@triton.jit
def _backward_step(low_VK, high_VK, i, q, k, do, solve, attend, scale_rows, scales, one, dr, dstates, first, end, chunk,
                   head, tile,
                   H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                   ROWS: tl.constexpr, PRECISION: tl.constexpr, CHUNKS: tl.constexpr, PARTIAL: tl.constexpr):
    """The halves of the state's gradient before chunk number i of the span; as `_forward_step`."""
    KL: tl.constexpr = min(K, 128)
    offset, col = tl.arange(0, C), tile * BV + tl.arange(0, BV)
    dtype = k.dtype
    row, here = first + i * C, (chunk + i) * H + head
    left = end - row
    do_CV = do.load([row, head * V + tile * BV])
    if PARTIAL:
        do_CV = _rows_inside(do_CV, left, C)
    do_VC = tl.trans(do_CV)
    u_CC, p_CC = solve.load([here * C, 0]), attend.load([here * C, 0])
    key_out = scale_rows.load([here * ROWS + KEY_OUT, 0])
    b = scale_rows.load([here * ROWS + BETA, 0])
    decay = tl.exp(tl.load(scales + here.to(tl.int64) * (ROWS * C) + (DECAY * C + C - 1)))

    sk_VC, k_low, k_high = _state_times_keys(low_VK, high_VK, k, row, head, left, dstates, here, tile, K, V, BV, C,
                                             PRECISION, CHUNKS, PARTIAL)
    dx_VC = tl.dot(do_VC, p_CC, key_out * sk_VC, input_precision=PRECISION)
    dr_VC = tl.dot((dx_VC * -b).to(dtype), u_CC, dx_VC, input_precision=PRECISION)
    if CHUNKS:
        value_tile = (row.to(tl.int64) * H + head) * V + col[:, None] + offset[None, :] * (H * V)
        tl.store(dr + value_tile, dr_VC.to(dtype), mask=offset[None, :] < left)
    from_o = (do_VC.to(tl.float32) * scale_rows.load([here * ROWS + QUERY_IN, 0])).to(dtype)
    from_r = (dr_VC * (-b * scale_rows.load([here * ROWS + KEY_IN, 0]))).to(dtype)
    q_low = q.load([row, head * K])
    if PARTIAL:
        q_low = _rows_inside(q_low, left, C)
    low_VK = tl.dot(from_o, q_low, low_VK * decay, input_precision=PRECISION)
    low_VK = tl.dot(from_r, k_low, low_VK, input_precision=PRECISION)
    if K > KL:
        q_high = q.load([row, head * K + KL])
        if PARTIAL:
            q_high = _rows_inside(q_high, left, C)
        high_VK = tl.dot(from_o, q_high, high_VK * decay, input_precision=PRECISION)
        high_VK = tl.dot(from_r, k_high, high_VK, input_precision=PRECISION)
        high_VK *= one  # as in the forward pass
    if K > KL:
        return low_VK, high_VK
    else:
        return low_VK, low_VK


@triton.jit
def _backward_kernel(q, k, do, solve, attend, scale_rows, scales, spans, one, dstate_out, dstate_in, dr, dstates,
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
    first, end, chunk = load_span(spans, span)
    whole = (end - first) // C
    dim, col = tl.arange(0, KL), tile * BV + tl.arange(0, BV)
    state_tile = (span * H + head).to(tl.int64) * (K * V) + col[:, None] + dim[None, :] * V

    low_VK = tl.zeros([BV, KL], tl.float32)
    if HAS_STATE:
        low_VK += tl.load(dstate_out + state_tile)
    if K > KL:
        high_VK = tl.zeros([BV, KL], tl.float32)
        if HAS_STATE:
            high_VK += tl.load(dstate_out + KL * V + state_tile)
    if whole * C < end - first:
        if K > KL:
            low_VK, high_VK = _backward_step(
                low_VK, high_VK, whole, q, k, do, solve, attend, scale_rows, scales, one, dr, dstates, first, end,
                chunk, head, tile, H, K, V, BV, C, ROWS, PRECISION, CHUNKS, True)
        else:
            low_VK, _ = _backward_step(
                low_VK, low_VK, whole, q, k, do, solve, attend, scale_rows, scales, one, dr, dstates, first, end,
                chunk, head, tile, H, K, V, BV, C, ROWS, PRECISION, CHUNKS, True)
    for step in tl.range(0, whole, num_stages=STAGES):
        i = whole - 1 - step
        if K > KL:
            low_VK, high_VK = _backward_step(
                low_VK, high_VK, i, q, k, do, solve, attend, scale_rows, scales, one, dr, dstates, first, end,
                chunk, head, tile, H, K, V, BV, C, ROWS, PRECISION, CHUNKS, False)
        else:
            low_VK, _ = _backward_step(
                low_VK, low_VK, i, q, k, do, solve, attend, scale_rows, scales, one, dr, dstates, first, end,
                chunk, head, tile, H, K, V, BV, C, ROWS, PRECISION, CHUNKS, False)
    tl.store(dstate_in + state_tile, low_VK)
    if K > KL:
        tl.store(dstate_in + KL * V + state_tile, high_VK)


def launch_state_pass(*, q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, scales: Tensor, solve: Tensor, attend: Tensor,
                      layout: Layout, state_PHKV: Tensor | None, keep_states: bool,
                      precision: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """o [M, H, V], squares of the score [M, H, tiles] fp32, outgoing state of every span [P, H, K, V] fp32; with
    keep_states also what `recompute_states` returns.
    """
    (tokens, heads, value_dim), key_dim = v_MHV.shape, k_MHK.shape[2]
    launch = launch_of("gated_delta_forward", key_dim, value_dim, v_MHV.element_size())
    o = torch.empty_like(v_MHV)
    square = v_MHV.new_empty(tokens, heads, value_dim // launch.tile, dtype=torch.float32)
    state_out = v_MHV.new_empty(layout.span_count, heads, key_dim, value_dim, dtype=torch.float32)
    states = v_MHV.new_empty(layout.chunk_count, heads, value_dim, key_dim) if keep_states else None
    residual = torch.empty_like(v_MHV) if keep_states else None
    _forward_kernel[(layout.span_count * heads * (value_dim // launch.tile),)](
        _keys(q_MHK), _keys(k_MHK), _values(v_MHV, launch), _matrices(solve), _matrices(attend), _scale_rows(scales),
        scales, layout.spans, 1.0, state_PHKV, state_out, o, square, residual,
        _states(states, launch) if keep_states else None, None, H=heads, K=key_dim, V=value_dim,
        HAS_STATE=state_PHKV is not None, OUTPUT=True, STATES=keep_states, MAPS=False, **_options(launch, precision))
    return o, square, state_out, states, residual


def recompute_states(*, k_MHK: Tensor, v_MHV: Tensor, scales: Tensor, solve: Tensor, layout: Layout,
                     state_PHKV: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
    """Incoming state of every chunk, transposed [U, H, V, K], and the residuals e [M, H, V], both in v's dtype."""
    (_, heads, value_dim), key_dim = v_MHV.shape, k_MHK.shape[2]
    launch = launch_of("gated_delta_states", key_dim, value_dim, v_MHV.element_size())
    residual = torch.empty_like(v_MHV)
    states = v_MHV.new_empty(layout.chunk_count, heads, value_dim, key_dim)
    _forward_kernel[(layout.span_count * heads * (value_dim // launch.tile),)](
        None, _keys(k_MHK), _values(v_MHV, launch), _matrices(solve), None, _scale_rows(scales), scales, layout.spans,
        1.0, state_PHKV, None, None, None, residual, _states(states, launch), None, H=heads, K=key_dim, V=value_dim,
        HAS_STATE=state_PHKV is not None, OUTPUT=False, STATES=True, MAPS=False, **_options(launch, precision))
    return states, residual


def span_maps(*, k_MHK: Tensor, v_MHV: Tensor, scales: Tensor, solve: Tensor, layout: Layout,
              precision: str) -> tuple[Tensor, Tensor]:
    """What each span does to the state that enters it, S_out = M S_in + E: [E | M] [P, H, K, V + K] and M^T
    [P, H, K, K], fp32.
    """
    (_, heads, value_dim), key_dim = v_MHV.shape, k_MHK.shape[2]
    launch = launch_of("gated_delta_states", key_dim, value_dim, v_MHV.element_size())
    if launch.tile > key_dim:
        launch = Launch(key_dim, 4, launch.stages)
    maps = v_MHV.new_empty(layout.span_count, heads, key_dim, value_dim + key_dim, dtype=torch.float32)
    M_T = maps.new_empty(layout.span_count, heads, key_dim, key_dim)
    _forward_kernel[(layout.span_count * heads * ((value_dim + key_dim) // launch.tile),)](
        None, _keys(k_MHK), _values(v_MHV, launch), _matrices(solve), None, _scale_rows(scales), scales, layout.spans,
        1.0, None, maps, None, None, None, None, M_T, H=heads, K=key_dim, V=value_dim, HAS_STATE=False, OUTPUT=False,
        STATES=False, MAPS=True, **_options(launch, precision))
    return maps, M_T


def launch_state_pass_backward(*, q_MHK: Tensor, k_MHK: Tensor, do_MHV: Tensor, scales: Tensor, solve: Tensor,
                               attend: Tensor, layout: Layout, dstate_PHKV: Tensor | None, precision: str,
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
        _keys(q_MHK), _keys(k_MHK), _values(do_MHV, launch), _matrices(solve), _matrices(attend), _scale_rows(scales),
        scales, layout.spans, 1.0, dstate_PHKV, dstate_in, dr, _states(dstates, launch) if every_chunk else None,
        H=heads, K=key_dim, V=value_dim, HAS_STATE=dstate_PHKV is not None, CHUNKS=every_chunk,
        **_options(launch, precision))
    return dr, dstates, dstate_in


def _options(launch: Launch, precision: str) -> dict[str, object]:
    return {"BV": launch.tile, "C": CHUNK, "ROWS": SCALES, "PRECISION": precision, "STAGES": launch.stages,
            "num_warps": launch.warps, "maxnreg": launch.registers}


# what the kernels take by whole tiles: a chunk's tokens and at most half of K, or one tile of V; a chunk's matrix; one
# row of its scales; a tile of its transposed state

def _keys(x_MHK: Tensor) -> TensorDescriptor:
    heads, key_dim = x_MHK.shape[1:]
    return tiles_of(x_MHK, heads * key_dim, CHUNK, min(key_dim, 128))


def _values(x_MHV: Tensor, launch: Launch) -> TensorDescriptor:
    heads, value_dim = x_MHV.shape[1:]
    return tiles_of(x_MHV, heads * value_dim, CHUNK, launch.tile)


def _matrices(x_UHCC: Tensor) -> TensorDescriptor:
    return tiles_of(x_UHCC, CHUNK, CHUNK, CHUNK)


def _scale_rows(scales: Tensor) -> TensorDescriptor:
    return tiles_of(scales, CHUNK, 1, CHUNK)


def _states(x_UHVK: Tensor, launch: Launch) -> TensorDescriptor:
    return tiles_of(x_UHVK, x_UHVK.shape[3], launch.tile, min(x_UHVK.shape[3], 128))
