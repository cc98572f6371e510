"""One decoded token on the GPU: three launches for the whole memory of a HOLA layer.

    state    S and o_state of every head, by columns of the value            [K, TILE] of S in registers
    read     the token joins the open block; cache, block and sink are read; the two outputs are added
    close    where a block is full: the w best of cache and block stay, in order of position

All of it is bounded by the memory's shapes: no launch depends on a length, nothing is read on the host, so a
CUDA graph of the step serves every token. A step reads the memory once (K V floats a head and up to w + C keys and
values), writes the state back, and copies rows of the cache once in C tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.exact_cache.triton_select import sortable_key
from hola_kernels.integers import next_power_of_2
from hola_kernels.norms import L2_EPS, RMS_EPS
from hola_kernels.options import CacheOptions
from hola_kernels.state import HolaState

VALUE_TILE = 32  # columns of S a program owns
ROWS = 32  # tokens of a tile of the cache or the open block
SCORES = {"betae": 0, "e": 1, "betav": 2}  # anything else comes as numbers


@triton.jit
def _state_kernel(q, k, v, log_decay, beta, state, o_state, square,
                  K: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr, EPS: tl.constexpr):
    """TILE columns of one head: S = exp(g) S + beta k^ r', r = v - exp(g) S'k^; o = K^-1/2 S'q^, and their |r|^2."""
    TILES: tl.constexpr = V // TILE
    tile, row = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    dim, col = tl.arange(0, K), tile * TILE + tl.arange(0, TILE)
    q_K = tl.load(q + row * K + dim).to(tl.float32)
    k_K = tl.load(k + row * K + dim).to(tl.float32)
    q_K *= tl.rsqrt(tl.sum(q_K * q_K, 0) + EPS)
    k_K *= tl.rsqrt(tl.sum(k_K * k_K, 0) + EPS)
    b = tl.load(beta + row).to(tl.float32)
    at = state + row.to(tl.int64) * (K * V) + dim[:, None] * V + col[None, :]
    s_KV = tl.load(at) * tl.exp(tl.load(log_decay + row).to(tl.float32))
    r_V = tl.load(v + row * V + col).to(tl.float32) - tl.sum(s_KV * k_K[:, None], 0)
    s_KV += (b * k_K)[:, None] * r_V[None, :]
    tl.store(at, s_KV)
    tl.store(o_state + row * V + col, tl.sum(s_KV * q_K[:, None], 0) * K ** -0.5)
    tl.store(square + row * TILES + tile, tl.sum(r_V * r_V, 0))


@triton.jit
def _more(keys, values, at_T, seen_T, query_K, most, total, sum_V, dim, col,
          K: tl.constexpr, V: tl.constexpr, MEAN: tl.constexpr, EPS: tl.constexpr):
    """The running softmax (largest logit, sum of weights, weighted values) after rows `at` of keys and values."""
    key_TK = tl.load(keys + at_T[:, None] * K + dim[None, :], mask=seen_T[:, None], other=0.0).to(tl.float32)
    logit_T = tl.sum(key_TK * query_K[None, :], 1) * tl.rsqrt(tl.sum(key_TK * key_TK, 1) * MEAN + EPS)
    logit_T = tl.where(seen_T, logit_T, float("-inf"))
    now = tl.maximum(most, tl.max(logit_T, 0))
    weight_T, old = tl.exp(logit_T - now), tl.exp(most - now)
    value_TV = tl.load(values + at_T[:, None] * V + col[None, :], mask=seen_T[:, None], other=0.0).to(tl.float32)
    return now, total * old + tl.sum(weight_T, 0), sum_V * old + tl.sum(weight_T[:, None] * value_TV, 0)


@triton.jit
def _read_kernel(q, k, v, beta, o_state, square, rank, gamma_q, gamma_k, gate, sink, cache_k, cache_v, cache_position,
                 open_k, open_v, open_score, length, out, H, slots, block,
                 K: tl.constexpr, V: tl.constexpr, TILES: tl.constexpr, T: tl.constexpr, SCORE: tl.constexpr,
                 SINK: tl.constexpr, MEAN: tl.constexpr, EPS: tl.constexpr):
    """One program a sequence and head. Registers: tiles [T, K] and [T, V], the sum [V]. `length` is still without the
    token, whose own key and value are read as they are stored."""
    row = tl.program_id(0)
    n, h = row // H, row % H
    dim, col = tl.arange(0, K), tl.arange(0, V)
    offset = (tl.load(length + n) % block).to(tl.int32)
    b = tl.load(beta + row).to(tl.float32)
    k_K = tl.load(k + row * K + dim).to(open_k.dtype.element_ty)
    v_V = tl.load(v + row * V + col).to(open_v.dtype.element_ty)
    mine = (n.to(tl.int64) * block + offset) * H + h
    tl.store(open_k + mine * K + dim, k_K)
    tl.store(open_v + mine * V + col, v_V)
    if SCORE <= 1:
        size = tl.sqrt(tl.sum(tl.load(square + row * TILES + tl.arange(0, TILES)), 0))
        score = size * b if SCORE == 0 else tl.where(b > 0, size, 0.0)  # what is not written has no |e|
    elif SCORE == 2:
        whole_V = tl.load(v + row * V + col).to(tl.float32)
        score = b * tl.sqrt(tl.sum(whole_V * whole_V, 0))
    else:
        score = tl.load(rank + row).to(tl.float32)
    tl.store(open_score + mine, score)

    q_K = tl.load(q + row * K + dim).to(tl.float32)
    q_K *= tl.rsqrt(tl.sum(q_K * q_K, 0) * MEAN + EPS) * tl.load(gamma_q + dim).to(tl.float32)
    query_K = q_K * tl.load(gamma_k + dim).to(tl.float32) * K ** -0.5
    own_K = k_K.to(tl.float32)
    most = tl.sum(own_K * query_K, 0) * tl.rsqrt(tl.sum(own_K * own_K, 0) * MEAN + EPS)
    total, sum_V = most * 0 + 1, v_V.to(tl.float32)
    if SINK:
        logit = tl.load(sink + h).to(tl.float32)
        now = tl.maximum(most, logit)
        old = tl.exp(most - now)
        most, total, sum_V = now, old + tl.exp(logit - now), sum_V * old
    for start in range(0, slots, T):
        slot = start + tl.arange(0, T)
        at = row.to(tl.int64) * slots + slot
        seen = tl.load(cache_position + at, mask=slot < slots, other=-1) >= 0
        most, total, sum_V = _more(cache_k, cache_v, at, seen, query_K, most, total, sum_V, dim, col, K, V, MEAN, EPS)
    for start in range(0, offset, T):
        token = start + tl.arange(0, T)
        at = (n.to(tl.int64) * block + token) * H + h
        most, total, sum_V = _more(open_k, open_v, at, token < offset, query_K, most, total, sum_V, dim, col, K, V,
                                   MEAN, EPS)
    o_V = tl.load(o_state + row * V + col) + tl.sigmoid(tl.load(gate + h).to(tl.float32)) * sum_V / total
    tl.store(out + row * V + col, o_V.to(out.dtype.element_ty))


@triton.jit
def _close_kernel(length, cache_score, cache_position, cache_k, cache_v, open_k, open_v, open_score, source,
                  H, slots, block, K: tl.constexpr, V: tl.constexpr, T: tl.constexpr, CANDIDATES: tl.constexpr,
                  SLOTS: tl.constexpr):
    """One program a sequence and head; does nothing unless the open block is full. Ties go to the earlier token.

    Candidates are the cache's tokens and then the block's, in order of position, so a token that stays never moves
    to a later slot: rows move tile by tile in place, each tile read before it is written.
    """
    row = tl.program_id(0)
    n, h = row // H, row % H
    seen = tl.load(length + n)
    if seen % block == 0:
        mine, open_row = row.to(tl.int64) * slots, n.to(tl.int64) * block
        at = tl.arange(0, CANDIDATES)
        is_slot, token = at < slots, at - slots
        is_open = (token >= 0) & (token < block)
        position = tl.load(cache_position + mine + at, mask=is_slot, other=-1)
        position = tl.where(is_open, seen - block + token, position)
        kept_score = tl.load(cache_score + mine + at, mask=is_slot, other=0.0)
        new_score = tl.load(open_score + (open_row + token) * H + h, mask=is_open, other=0.0)
        score = tl.where(is_open, new_score, kept_score)
        key = tl.where(position >= 0, sortable_key(score), 0)
        threshold = tl.full((), 0, tl.uint32)
        for i in range(32):
            probe = threshold | (tl.full((), 2147483648, tl.uint32) >> i)
            threshold = tl.where(tl.sum((key >= probe).to(tl.int32)) >= slots, probe, threshold)
        above = tl.sum((key > threshold).to(tl.int32))
        equal = ((key == threshold) & (position >= 0)).to(tl.int32)
        keep = (key > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= slots - above))
        target = tl.cumsum(keep.to(tl.int32), 0) - 1
        written = tl.sum(keep.to(tl.int32))
        tl.debug_barrier()  # all candidates are read before any is overwritten
        tl.store(cache_score + mine + target, score, mask=keep)
        tl.store(cache_position + mine + target, position, mask=keep)
        tl.store(source + mine + target, at, mask=keep)
        every = tl.arange(0, SLOTS)
        is_empty = (every >= written) & (every < slots)
        tl.store(cache_score + mine + every, tl.full((SLOTS,), float("-inf"), tl.float32), mask=is_empty)
        tl.store(cache_position + mine + every, tl.full((SLOTS,), -1, tl.int64), mask=is_empty)
        tl.store(source + mine + every, tl.full((SLOTS,), -1, tl.int32), mask=is_empty)
        tl.debug_barrier()
        for start in range(0, slots, T):
            slot = start + tl.arange(0, T)
            origin = tl.load(source + mine + slot, mask=slot < slots, other=-1)
            _move(cache_k, open_k, mine, open_row, slot, origin, slots, H, h, K)
            _move(cache_v, open_v, mine, open_row, slot, origin, slots, H, h, V)
        tl.debug_barrier()  # the last rows are read
        for start in range(0, block, T):
            left = start + tl.arange(0, T)
            to = (open_row + left) * H + h
            _clear(open_k, to, left < block, K)
            _clear(open_v, to, left < block, V)
            tl.store(open_score + to, tl.zeros_like(to).to(tl.float32), mask=left < block)


@triton.jit
def _move(cache, open_rows, mine, open_row, slot, origin, slots, H, h, WIDTH: tl.constexpr):
    """Rows `origin` of cache and then open block to the slots `slot`; zeros where origin is -1."""
    dim = tl.arange(0, WIDTH)
    held = tl.load(cache + (mine + origin)[:, None] * WIDTH + dim[None, :],
                   mask=((origin >= 0) & (origin < slots))[:, None], other=0.0)
    fresh = tl.load(open_rows + ((open_row + origin - slots) * H + h)[:, None] * WIDTH + dim[None, :],
                    mask=(origin >= slots)[:, None], other=0.0)
    rows = tl.where((origin >= slots)[:, None], fresh.to(held.dtype), held)
    tl.debug_barrier()
    tl.store(cache + (mine + slot)[:, None] * WIDTH + dim[None, :], rows, mask=(slot < slots)[:, None])


@triton.jit
def _clear(rows, to, there, WIDTH: tl.constexpr):
    dim = tl.arange(0, WIDTH)
    tl.store(rows + to[:, None] * WIDTH + dim[None, :], tl.zeros([to.shape[0], WIDTH], rows.dtype.element_ty),
             mask=there[:, None])


def state_step(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
               state: Tensor) -> tuple[Tensor, Tensor]:
    """o_state [N, H, V] and |r|^2 of every tile of values [N, H, tiles], float32; `state` is updated in place.

    Contiguous q, k [N, H, K], v [N, H, V], log_decay, beta [N, H]; state [N, H, K, V] float32.
    """
    (sequences, heads, value_dim), key_dim = v.shape, k.shape[2]
    tile = min(VALUE_TILE, value_dim)
    o_state = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    square = torch.empty(sequences, heads, value_dim // tile, dtype=torch.float32, device=v.device)
    _state_kernel[(sequences * heads * (value_dim // tile),)](
        q, k, v, log_decay, beta, state, o_state, square, K=key_dim, V=value_dim, TILE=tile, EPS=L2_EPS, num_warps=4)
    return o_state, square


def attention_step_triton(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor,
                          gamma_k: Tensor, gate: Tensor, sink: Tensor | None, state: HolaState,
                          options: CacheOptions, rank: Tensor | None) -> Tensor:
    """As hola_attention_step, o [N, H, V] in v's dtype. rank [N, H]: where options.score is none of SCORES."""
    (sequences, heads, value_dim), key_dim = v.shape, k.shape[2]
    q, k, v, log_decay, beta = (x.contiguous() for x in (q, k, v, log_decay, beta))
    gamma_q, gamma_k, gate, sink = (None if x is None else x.contiguous() for x in (gamma_q, gamma_k, gate, sink))
    o_state, square = state_step(q=q, k=k, v=v, log_decay=log_decay, beta=beta, state=state.state)
    out, is_rms = torch.empty_like(v), options.read_norm == "rms"
    sizes = (heads, state.slots, state.block)
    _read_kernel[(sequences * heads,)](
        q, k, v, beta, o_state, square, o_state if rank is None else rank.contiguous(), gamma_q, gamma_k, gate,
        o_state if sink is None else sink, state.cache_k, state.cache_v, state.cache_position, state.open_k,
        state.open_v, state.open_score, state.length, out, *sizes, K=key_dim, V=value_dim, TILES=square.shape[2],
        T=ROWS, SCORE=SCORES.get(options.score, len(SCORES)), SINK=sink is not None,
        MEAN=1.0 / key_dim if is_rms else 1.0, EPS=RMS_EPS if is_rms else L2_EPS, num_warps=4)
    state.length += 1
    source = torch.empty(state.cache_score.shape, dtype=torch.int32, device=v.device)
    _close_kernel[(sequences * heads,)](
        state.length, state.cache_score, state.cache_position, state.cache_k, state.cache_v, state.open_k, state.open_v,
        state.open_score, source, *sizes, K=key_dim, V=value_dim, T=ROWS,
        CANDIDATES=next_power_of_2(state.slots + state.block), SLOTS=next_power_of_2(state.slots), num_warps=4)
    return out
