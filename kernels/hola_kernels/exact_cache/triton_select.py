"""Selection on the device: the w best candidates of every block, all blocks at the same time.

One program chooses one cache (a job of `SelectionPlan`, one head). It never sorts: it finds
the w-th largest key by bisection over the 32 bits of the score, then writes the rows at or
above it in their order, which is the order of position. Ties at the threshold go to the
earlier candidates. Everything is integer comparison, so the choice is exact and repeatable.

Cost at B16 T2048 H4 C256 w64: 512 programs read at most 7 KB of scores each (L2), 32
passes over 2,048 keys in registers; no sequential pass over blocks, no host synchronisation.
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
def sortable_key(score):
    """float32 -> uint32 in the same order; every number maps above 0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0: they are equal, the earlier wins
    flipped = tl.where(bits < 0, ~bits, bits | -2147483648)
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def _candidates(rank, score_ptr, list_rows_ptr, list_score_ptr, list_from, lists, row_from, tokens, h, H, w):
    """Row (-1: none), key (0: none) and score of the candidates at `rank` in the job's sequence of candidates."""
    listed = lists * w
    in_list = rank < listed
    at = ((list_from + rank // w) * H + h) * w + rank % w
    row = tl.load(list_rows_ptr + at, mask=in_list, other=-1)
    score = tl.load(list_score_ptr + at, mask=in_list, other=0.0)
    token = rank - listed
    is_token = (token >= 0) & (token < tokens)
    token_row = row_from + token
    token_score = tl.load(score_ptr + token_row.to(tl.int64) * H + h, mask=is_token, other=0.0)
    row = tl.where(is_token, token_row, row)
    score = tl.where(is_token, token_score, score)
    return row, tl.where(row >= 0, sortable_key(score), 0), score


@triton.jit
def _top_slots_kernel(jobs_ptr, score_ptr, list_rows_ptr, list_score_ptr, target_ptr, rows_ptr, row_score_ptr, H, w,
                      SLOTS: tl.constexpr, TILE: tl.constexpr, WRITE_SCORE: tl.constexpr, SCATTER: tl.constexpr):
    """rows_ptr[target[job], head, :w] = the w best candidates, -1 after the last.

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
        job = tl.load(target_ptr + job).to(tl.int32)
    out = (job.to(tl.int64) * H + h) * w
    written, equal_before = above * 0, above * 0
    for t in range(0, tiles):
        row, key, score = _candidates(t * TILE + lane, score_ptr, list_rows_ptr, list_score_ptr, list_from, lists,
                                      row_from, tokens, h, H, w)
        equal = ((key == threshold) & (row >= 0)).to(tl.int32)
        earlier = equal_before + tl.cumsum(equal, 0)
        keep = (key > threshold) | ((equal > 0) & (earlier <= w - above))
        slot = written + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(rows_ptr + out + slot, row, mask=keep)
        if WRITE_SCORE:
            tl.store(row_score_ptr + out + slot, score, mask=keep)
        written += tl.sum(keep.to(tl.int32))
        equal_before += tl.sum(equal)
    every = tl.arange(0, SLOTS)
    tl.store(rows_ptr + out + every, tl.full((SLOTS,), -1, tl.int32), mask=(every >= written) & (every < w))


def launch_top_slots(*, jobs: Tensor, score_MH: Tensor, list_rows: Tensor, list_score: Tensor, rows: Tensor,
                     row_score: Tensor | None = None, target: Tensor | None = None,
                     max_candidates: int = CANDIDATES) -> None:
    """rows[target] (or rows) [J, H, w] int32 <- the w best of every job; row_score gets their scores.

    max_candidates: that a job can have; beyond WIDEST they are read again in every pass.
    """
    heads, slots = rows.shape[1:]
    tile = 256 if interpreted() else min(max(next_power_of_2(max_candidates), CANDIDATES), WIDEST)
    _top_slots_kernel[(jobs.shape[0], heads)](
        jobs, score_MH, list_rows, list_score, jobs if target is None else target, rows,
        rows if row_score is None else row_score, heads, slots, SLOTS=next_power_of_2(slots), TILE=tile,
        WRITE_SCORE=row_score is not None, SCATTER=target is not None, num_warps=4)


def select_slots(*, score_MH: Tensor, plan: SelectionPlan, slots: int, incoming_rows: Tensor | None = None,
                 incoming_score: Tensor | None = None, final: bool = False) -> Tensor:
    """The cache of every block, [U, H, w] int32 rows in order of position, -1 where a slot is empty.

    score_MH [M, H] float32. incoming_rows, incoming_score [N, H, w]: the caches that the segments
    carry (row -1: empty). With `final` the caches after the call follow: [U + N, H, w].
    """
    heads, device = score_MH.shape[1], score_MH.device
    jobs = torch.cat([plan.block_jobs, plan.final_jobs]) if final else plan.block_jobs
    rows = torch.empty(jobs.shape[0], heads, slots, dtype=torch.int32, device=device)
    if not slots:
        return rows
    list_rows, list_score = incoming_rows, incoming_score
    if plan.span_jobs is not None:
        spans = plan.span_jobs.shape[0]
        total = spans + (0 if incoming_rows is None else incoming_rows.shape[0])
        span_rows = torch.empty(total, heads, slots, dtype=torch.int32, device=device)
        span_score = torch.empty(total, heads, slots, dtype=torch.float32, device=device)
        if incoming_rows is not None:
            span_rows[plan.incoming_list], span_score[plan.incoming_list] = incoming_rows, incoming_score
        launch_top_slots(jobs=plan.span_jobs, score_MH=score_MH, list_rows=span_rows, list_score=span_score,
                         rows=span_rows, row_score=span_score, target=plan.span_list)
        list_rows = torch.empty(spans, heads, slots, dtype=torch.int32, device=device)
        list_score = torch.empty(spans, heads, slots, dtype=torch.float32, device=device)
        launch_top_slots(jobs=plan.prefix_jobs, score_MH=score_MH, list_rows=span_rows, list_score=span_score,
                         rows=list_rows, row_score=list_score, max_candidates=plan.max_lists * slots)
    if list_rows is None:
        list_rows, list_score = rows, score_MH  # no job reads them
    launch_top_slots(jobs=jobs, score_MH=score_MH, list_rows=list_rows, list_score=list_score, rows=rows)
    return rows
