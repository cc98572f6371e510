"""The w best tokens of a few long runs of scores, by the selection kernel: a top w of the top w's of spans."""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.exact_cache.selection_plan import CANDIDATES
from hola_kernels.exact_cache.triton_select import launch_top_slots
from hola_kernels.integers import cdiv
from hola_kernels.memo import by_shape


def best_rows(score_MH: Tensor, runs: tuple[tuple[int, int], ...], slots: int) -> Tensor:
    """[N, H, w] int32: rows of the w best tokens of each run [from, to) of rows, in their order, -1 after the last.

    score [M, H] float32. Ties go to the earlier token. The tables follow from the runs alone: nothing waits.
    """
    heads, device = score_MH.shape[1], score_MH.device
    spans, joins = _jobs(runs, device)
    span_rows = torch.empty(spans.shape[0], heads, slots, dtype=torch.int32, device=device)
    span_score = torch.empty(spans.shape[0], heads, slots, dtype=torch.float32, device=device)
    launch_top_slots(jobs=spans, score_MH=score_MH, list_rows=span_rows, list_score=span_score, rows=span_rows,
                     row_score=span_score)
    rows = torch.empty(len(runs), heads, slots, dtype=torch.int32, device=device)
    lists = max(cdiv(end - start, CANDIDATES) for start, end in runs)
    launch_top_slots(jobs=joins, score_MH=score_MH, list_rows=span_rows, list_score=span_score, rows=rows,
                     max_candidates=lists * slots)
    return rows


@by_shape
def _jobs(runs: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Jobs as in `SelectionPlan`: spans of every run, then the lists of a run's spans joined."""
    spans, joins = [], []
    for start, end in runs:
        first = len(spans)
        spans += [(0, 0, at, min(at + CANDIDATES, end)) for at in range(start, max(end, start + 1), CANDIDATES)]
        joins.append((first, len(spans), 0, 0))
    return tuple(torch.tensor(jobs, dtype=torch.int32).to(device, non_blocking=True) for jobs in (spans, joins))
