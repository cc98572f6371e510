"""verify's cases in several processes: most of a sweep is compiling, which keeps one core of a process busy."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

import torch

from hola_kernels.verify_rows import rows_of

Chosen = list[tuple[str, str]]  # (module that holds the case, its name)
CASES = 3  # of one task: neighbours share kernels


def in_processes(chosen: Chosen, jobs: int, gpus: list[str]) -> Iterator[tuple[str, bool]]:
    """(row of the table, passed) of every case, as they end, from `jobs` processes that have one of `gpus` each.

    A process that dies takes the pool with it: whatever has no row by then is a failure and says so.
    """
    tasks = [chosen[at:at + CASES] for at in range(0, len(chosen), CASES)]
    tasks.sort(key=_work, reverse=True)  # the longest first: none of them is waited for alone at the end
    context = multiprocessing.get_context("spawn")
    turns = context.SimpleQueue()
    for n in range(jobs):
        turns.put(gpus[n % len(gpus)] if gpus else "")
    with ProcessPoolExecutor(jobs, context, initializer=_take_gpu, initargs=(turns,)) as pool:
        running = {pool.submit(_rows, task): task for task in tasks}
        for future in as_completed(running):
            yield from _result(future, running[future])


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]


def _work(task: Chosen) -> int:
    """About how long a task takes, a relative number: float32 products over large widths are the slowest to compile."""
    return sum(int((re.search(r"K=(\d+)", name) or [0, 64])[1]) * (4 if "float32" in name else 1)
               * (6 if re.search("split|long|busy", name) else 1) for _, name in task)


def _take_gpu(turns: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = turns.get()  # read when CUDA starts, which is at the first case
    torch.set_num_threads(1)


def _rows(task: Chosen) -> list[tuple[str, bool]]:
    rows = list(rows_of(task))
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # others are on this GPU
    return rows


def _result(future: Future, task: Chosen) -> list[tuple[str, bool]]:
    try:
        return future.result()
    except Exception as error:  # the process, not a case: those are rows
        message = (str(error).splitlines() or [""])[0][:100]
        return [(f"| {name} | {type(error).__name__}: {message} | | | FAILED |", False) for _, name in task]
