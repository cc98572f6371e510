"""Timer of a step's compute on one rank."""

from __future__ import annotations

import time
from typing import Any

import torch


class StepTimer:
    """Seconds between `start` and `stop`, by CUDA events on a GPU, else by the host's clock."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def seconds(self) -> float:
        """Call after the step's results have been read, so that both events are complete."""
        start, end = self._marks
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start

    def _mark(self, which: int) -> None:
        if self._cuda:
            self._marks[which].record()
        else:
            self._marks[which] = time.perf_counter()
