"""The tasks of one model: what is stored is taken, the rest is run, and every finished task is kept at once.

Several processes (torchrun) share the rows of every task; the first one reads and writes the stored results and prints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hola_megatron.errors import RecipeError
from hola_megatron.evaluate.suite.jobs import Job, Subject
from hola_megatron.evaluate.suite.results import Outcome, Store
from hola_megatron.startup.world import read_world


@contextlib.contextmanager
def processes(device: str | None) -> Iterator[str | None]:
    """Join torchrun's processes, if this is one of several; gives the device of this one. RecipeError for --device."""
    world = read_world()
    if world.size == 1:
        yield device
        return
    if device is not None and device != "cpu":
        raise RecipeError(f"--device: {device} is one for all {world.size} processes; leave it out, each takes its own")
    dist.init_process_group("gloo")  # results only travel
    try:
        on_gpu = device is None and torch.cuda.is_available()
        yield f"cuda:{world.local_rank}" if on_gpu else "cpu"
    finally:
        dist.destroy_process_group()


def run_jobs(subject: Subject, jobs: Sequence[Job], store: Store, told: Callable[[str], None]) -> list[Outcome]:
    """The outcomes of `jobs` in their order. told: gets a line for every one. Raises what loading and tasks raise."""
    return [_outcome(subject, job, store, told, f"{n}/{len(jobs)}") for n, job in enumerate(jobs, 1)]


def _outcome(subject: Subject, job: Job, store: Store, told: Callable[[str], None], number: str) -> Outcome:
    outcome = _of_rank_zero(lambda: store.get(subject.digest, job.task, job.settings))
    kept = outcome is not None
    if outcome is None:
        outcome = job.run(subject)
        if rank() == 0:
            store.put(subject.digest, subject.name, outcome)
    numbers = ", ".join(f"{name} {measure}" for name, measure in outcome.metrics.items())
    told(f"{number} {job.task}: {numbers} ({outcome.items:,} items, "
         f"{'from an earlier run' if kept else f'{outcome.seconds:.1f} s'})")
    return outcome


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _of_rank_zero(find: Callable[[], Any]) -> Any:
    """find() of the first process, on all of them."""
    if not dist.is_initialized():
        return find()
    box = [find() if rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]
