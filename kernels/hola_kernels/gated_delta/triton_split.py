"""One long sequence on a whole GPU: its spans side by side, joined by the affine map of each.

The state pass takes chunks one after the other, so a batch of few long sequences would leave
most of the GPU idle. A span of chunks maps the state that enters it by S_out = M S_in + E.
All maps are found at once (starting from no state for E, from the identity for M), a short scan
over spans gives the state that enters each, and then all spans run at the same time. The
gradient goes back through the same M: dS_in = M^T dS_out + dE. The passes are done twice and M
costs K more columns, so a sequence is split only where it would take longer whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.gated_delta.triton_layout import Layout
from hola_kernels.triton_config import launch_of

GAIN = 2.5  # split when the longest sequence takes this many times its share of the GPU
LEAST_CHUNKS = 16  # of a span


@triton.jit
def _scan_kernel(matrices, additions, segment_spans, first_state, states,
                 H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MW: tl.constexpr, AW: tl.constexpr,
                 TILE: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr, HAS_STATE: tl.constexpr,
                 REVERSE: tl.constexpr):
    """One program per TILE state columns, head and segment: the state at the near side of every span.

    matrices [P, H, K, MW]: M in its last K columns, in REVERSE M^T; either way its rows are what a product reads.
    additions [P, H, K, AW]: E or, in REVERSE, dE in the first V columns.

    Registers: the state [K, TILE] fp32. Shared memory: a block [K, B] of the matrix, STAGES deep. The state's
    blocks [B, TILE] are read back from where they were just written. Plain tf32, a third faster, would round the
    diagonal of a span that forgets almost nothing, in every span the same way: 1 % of the state after 40 of them.
    """
    pid = tl.program_id(0)
    tile, head, segment = pid % (V // TILE), (pid // (V // TILE)) % H, pid // (V // TILE * H)
    first = tl.load(segment_spans + segment * 2)
    count = tl.load(segment_spans + segment * 2 + 1)
    dim, block, col = tl.arange(0, K), tl.arange(0, B), tile * TILE + tl.arange(0, TILE)
    state_KT = tl.zeros([K, TILE], tl.float32)
    if HAS_STATE:
        state_KT += tl.load(first_state + (segment * H + head).to(tl.int64) * (K * V) + dim[:, None] * V + col[None, :])
    for i in range(count):
        span = first + (count - 1 - i if REVERSE else i)
        here = (span * H + head).to(tl.int64)
        tl.store(states + here * (K * V) + dim[:, None] * V + col[None, :], state_KT)
        if i + 1 < count:  # the state after the last span is not needed
            tl.debug_barrier()  # all rows are written before any is read back
            state_KT = tl.load(additions + here * (K * AW) + dim[:, None] * AW + col[None, :])
            blocks = K // B if HAS_STATE else tl.where(i > 0, K // B, 0)  # there is nothing to multiply at first
            for j in tl.range(0, blocks, num_stages=STAGES):
                at = j * B + block
                part_BT = tl.load(states + here * (K * V) + at[:, None] * V + col[None, :])
                m_KB = tl.load(matrices + here * (K * MW) + dim[:, None] * MW + (MW - K) + at[None, :])
                state_KT = tl.dot(m_KB, part_BT, state_KT, input_precision="tf32x3")


def entering_states(*, maps: Tensor, layout: Layout, state_NHKV: Tensor | None, value_dim: int) -> Tensor:
    """The state entering each span [P, H, K, V] fp32, from [E | M] of each and the states entering the segments."""
    return _scan(maps, maps, layout, state_NHKV, value_dim, reverse=False)


def leaving_gradients(*, M_T: Tensor, dentering: Tensor, layout: Layout, dstate_NHKV: Tensor | None) -> Tensor:
    """The gradient of the state leaving each span [P, H, K, V], from M^T and dE of each and that of the final states.

    M_T: [P, H, K, K] fp32.
    """
    return _scan(M_T, dentering, layout, dstate_NHKV, dentering.shape[3], reverse=True)


def _scan(matrices: Tensor, additions: Tensor, layout: Layout, first: Tensor | None, value_dim: int,
          reverse: bool) -> Tensor:
    spans, heads, key_dim, width = matrices.shape
    launch = launch_of("gated_delta_scan", key_dim)
    states = matrices.new_empty(spans, heads, key_dim, value_dim)
    _scan_kernel[(layout.segment_count * heads * (value_dim // launch.tile),)](
        matrices, additions, layout.segment_spans, first, states, H=heads, K=key_dim, V=value_dim, MW=width,
        AW=additions.shape[3], TILE=launch.tile, B=32, STAGES=launch.stages,
        HAS_STATE=first is not None, REVERSE=reverse, num_warps=launch.warps)
    return states


def span_chunks(longest: int, total: int, programs_a_span: int, device: torch.device) -> int:
    """The most chunks a span should have on this device: all of the longest segment's, unless splitting pays.

    longest: chunks of the longest segment; total: of all.
    """
    if device.type != "cuda":
        return longest
    spans = max(torch.cuda.get_device_properties(device).multi_processor_count // programs_a_span, 1)
    share = max(-(-total // spans), LEAST_CHUNKS)
    return share if longest > GAIN * share else longest
