"""A rank's position in the parallel layout (`Layout`), and small collectives over all ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from hola_megatron.parallel.waiting import waiting_for_ranks


@dataclass(frozen=True)
class Layout:
    """Ranks and sizes of this process's tensor, pipeline, data and context group, and its device."""

    rank: int
    world: int
    tensor_rank: int
    tensor: int
    pipeline_rank: int
    pipeline: int
    data_rank: int
    data: int
    device: torch.device
    context_rank: int = 0
    context: int = 1

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes metrics."""
        return self.rank == 0

    def describe(self) -> str:
        context = f" x context {self.context}" if self.context > 1 else ""
        return f"{self.world} ranks = tensor {self.tensor}{context} x pipeline {self.pipeline} x data {self.data}"


@waiting_for_ranks()
def all_reduce_max(layout: Layout, *numbers: int) -> list[int]:
    """The maximum of each number over all ranks. One collective."""
    together = torch.tensor([int(number) for number in numbers], device=layout.device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return together.tolist()


def run_on_rank0(layout: Layout, action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0; returns its result, or raises its exception, on all ranks. A collective."""
    box: list[Any] = [None, None]
    if layout.is_main:
        try:
            box[0] = action()
        except Exception as error:
            box[1] = error
    with waiting_for_ranks():
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


class HoldsCommunicators(Protocol):
    """An object that must be released before process groups can be destroyed (a CUDA graph with NCCL kernels)."""

    def release(self) -> None: ...


_holders: weakref.WeakSet[HoldsCommunicators] = weakref.WeakSet()


def release_at_stop(holder: HoldsCommunicators) -> None:
    """Register a holder for `release_communicators`, by weak reference."""
    _holders.add(holder)


def release_communicators() -> None:
    """Call `release` of every registered holder that is alive."""
    for holder in list(_holders):
        holder.release()
