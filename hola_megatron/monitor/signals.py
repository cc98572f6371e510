"""SIGTERM and SIGUSR1: noted when they come, acted on by all ranks together at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

WATCHED = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers a signal; `agreed()` tells every rank whether any rank has seen one."""

    def __init__(self, device: torch.device):
        self.seen: int | None = None
        self._device = device
        self._before = {number: signal.signal(number, self._note) for number in WATCHED}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = number

    def agreed(self) -> str | None:
        """The signal's name if any rank has seen one, on all ranks. A collective."""
        number = torch.tensor([self.seen or 0], device=self._device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if int(number) else None

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
