"""Selection on the device: the w best candidates of every block, all blocks at the same time.

One program chooses one cache (a job of `SelectionPlan`, one head). It never sorts: it finds
the w-th largest key by bisection over the 32 bits of the score, then writes the rows at or
above it in their order, which is the order of position. Ties at the threshold go to the
earlier candidates. Everything is integer comparison, so the choice is exact and repeatable.

Cost at B16 T2048 H4 C256 w64: 512 programs read at most 7 KB of scores each (L2), 32
passes over 2,048 keys in registers; no sequential walk over blocks, no host synchronisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.backend import interpreted
from hola_kernels.exact_cache.selection_plan import CANDIDATES, SelectionPlan
from hola_kernels.integers import next_power_of_2

WIDEST = 4096  # candidates of a tile, where the lists of many spans are joined; 8,192 do not fit the registers


@triton.jit
def _sortable(score):
    """float32 -> uint32 in the same order; every number maps above 0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0: they are equal, the earlier wins
    flipped = tl.where(bits < 0, ~bits, bits | -2147483648)
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def _candidates(place, score_ptr, list_rows_ptr, list_score_ptr, list_from, lists, row_from, tokens, h, H, w):
    """Row (-1: none), key (0: none) and score of the candidates at `place` of the job's sequence of candidates."""
    listed = lists * w
    in_list = place < listed
    at = ((list_from + place // w) * H + h) * w + place % w
    row = tl.load(list_rows_ptr + at, mask=in_list, other=-1)
    score = tl.load(list_score_ptr + at, mask=in_list, other=0.0)
    token = place - listed
    is_token = (token >= 0) & (token < tokens)
    token_row = row_from + token
    token_score = tl.load(score_ptr + token_row.to(tl.int64) * H + h, mask=is_token, other=0.0)
    row = tl.where(is_token, token_row, row)
    score = tl.where(is_token, token_score, score)
    return row, tl.where(row >= 0, _sortable(score), 0), score


@triton.jit
def _top_slots_kernel(jobs_ptr, score_ptr, list_rows_ptr, list_score_ptr, to_ptr, rows_ptr, row_score_ptr, H, w,
                      SLOTS: tl.constexpr, TILE: tl.constexpr, WRITE_SCORE: tl.constexpr, SCATTER: tl.constexpr):
    """rows_ptr[to[job], head, :w] = the w best candidates, -1 behind the last.

    Registers: one tile of TILE int32 keys. HBM: scores [M, H], lists [L, H, w], rows [J, H, w].
    """
    job, h = tl.program_id(0), tl.program_id(1)
    list_from = tl.load(jobs_ptr + job * 4)
    lists = tl.load(jobs_ptr + job * 4 + 1) - list_from
    row_from = tl.load(jobs_ptr + job * 4 + 2)
    tokens = tl.load(jobs_ptr + job * 4 + 3) - row_from
    tiles = tl.cdiv(lists * w + tokens, TILE)
    lane = tl.arange(0, TILE)
    _, first_key, _ = _candidates(lane, score_ptr, list_rows_ptr, list_score_ptr, list_from, lists, row_from, tokens,
                               h, H, w)

    threshold = tl.full((), 0, tl.uint32)
    for i in range(32):
        probe = threshold | (tl.full((), 2147483648, tl.uint32) >> i)
        found = tl.sum((first_key >= probe).to(tl.int32))
        for t in range(1, tiles):
            _, key, _ = _candidates(t * TILE + lane, score_ptr, list_rows_ptr, list_score_ptr, list_from, lists,
                                 row_from, tokens, h, H, w)
            found += tl.sum((key >= probe).to(tl.int32))
        threshold = tl.where(found >= w, probe, threshold)

    above = tl.sum((first_key > threshold).to(tl.int32))
    for t in range(1, tiles):
        _, key, _ = _candidates(t * TILE + lane, score_ptr, list_rows_ptr, list_score_ptr, list_from, lists, row_from,
                             tokens, h, H, w)
        above += tl.sum((key > threshold).to(tl.int32))

    if SCATTER:
        job = tl.load(to_ptr + job).to(tl.int32)
    out = (job.to(tl.int64) * H + h) * w
    written, equal_before = above * 0, above * 0
    for t in range(0, tiles):
        row, key, score = _candidates(t * TILE + lane, score_ptr, list_rows_ptr, list_score_ptr, list_from, lists,
                                      row_from, tokens, h, H, w)
        equal = ((key == threshold) & (row >= 0)).to(tl.int32)
        earlier = equal_before + tl.cumsum(equal, 0)
        keep = (key > threshold) | ((equal > 0) & (earlier <= w - above))
        place = written + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(rows_ptr + out + place, row, mask=keep)
        if WRITE_SCORE:
            tl.store(row_score_ptr + out + place, score, mask=keep)
        written += tl.sum(keep.to(tl.int32))
        equal_before += tl.sum(equal)
    slot = tl.arange(0, SLOTS)
    tl.store(rows_ptr + out + slot, tl.full((SLOTS,), -1, tl.int32), mask=(slot >= written) & (slot < w))


def launch_top_slots(*, jobs: Tensor, score_MH: Tensor, list_rows: Tensor, list_score: Tensor, rows: Tensor,
                     row_score: Tensor | None = None, to: Tensor | None = None, most: int = CANDIDATES) -> None:
    """rows[to] (or rows) [J, H, w] int32 <- the w best of every job; row_score gets their scores.

    most: candidates that a job can have; beyond WIDEST they are read again in every pass.
    """
    heads, slots = rows.shape[1:]
    tile = 256 if interpreted() else min(max(next_power_of_2(most), CANDIDATES), WIDEST)
    _top_slots_kernel[(jobs.shape[0], heads)](
        jobs, score_MH, list_rows, list_score, jobs if to is None else to, rows,
        rows if row_score is None else row_score, heads, slots, SLOTS=next_power_of_2(slots), TILE=tile,
        WRITE_SCORE=row_score is not None, SCATTER=to is not None, num_warps=4)


def select_slots(*, score_MH: Tensor, plan: SelectionPlan, slots: int, incoming_rows: Tensor | None = None,
                 incoming_score: Tensor | None = None, final: bool = False) -> Tensor:
    """The cache of every unit, [U, H, w] int32 rows in order of position, -1 where a slot is empty.

    score_MH [M, H] float32. incoming_rows, incoming_score [N, H, w]: the caches that the segments
    bring along (row -1: empty). With `final` the caches after the call follow: [U + N, H, w].
    """
    heads, device = score_MH.shape[1], score_MH.device
    jobs = torch.cat([plan.unit, plan.final]) if final else plan.unit
    rows = torch.empty(jobs.shape[0], heads, slots, dtype=torch.int32, device=device)
    list_rows, list_score = incoming_rows, incoming_score
    if plan.own is not None:
        spans = plan.own.shape[0]
        total = spans + (0 if incoming_rows is None else incoming_rows.shape[0])
        own_rows = torch.empty(total, heads, slots, dtype=torch.int32, device=device)
        own_score = torch.empty(total, heads, slots, dtype=torch.float32, device=device)
        if incoming_rows is not None:
            own_rows[plan.incoming_list], own_score[plan.incoming_list] = incoming_rows, incoming_score
        launch_top_slots(jobs=plan.own, score_MH=score_MH, list_rows=own_rows, list_score=own_score, rows=own_rows,
                         row_score=own_score, to=plan.own_list)
        list_rows = torch.empty(spans, heads, slots, dtype=torch.int32, device=device)
        list_score = torch.empty(spans, heads, slots, dtype=torch.float32, device=device)
        launch_top_slots(jobs=plan.prefix, score_MH=score_MH, list_rows=own_rows, list_score=own_score,
                         rows=list_rows, row_score=list_score, most=plan.lists * slots)
    if list_rows is None:
        list_rows, list_score = rows, score_MH  # no job reads them
    launch_top_slots(jobs=jobs, score_MH=score_MH, list_rows=list_rows, list_score=list_score, rows=rows)
    return rows
