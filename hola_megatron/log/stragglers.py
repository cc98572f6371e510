"""Detection of slow ranks. Step times do not show them: every step takes as long as the slowest rank.

Each rank measures its own work: from the start of a step until it is ready to reduce gradients, and the wait for data.
Ranks are compared with their data-parallel peers (same pipeline stage and tensor rank).
"""

from __future__ import annotations

import socket
import statistics
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from hola_megatron.parallel.groups import Layout

MIN_STEPS = 5  # fewer are too noisy


class Stragglers:
    """Sums a rank's own seconds; `report` compares them over all ranks and resets the sums."""

    def __init__(self, layout: Layout, ratio: float):
        self.layout, self.ratio = layout, ratio
        mine = (layout.pipeline_rank, layout.tensor_rank, socket.gethostname())
        self._ranks: list[Any] = [mine] * layout.world
        if layout.world > 1:
            dist.all_gather_object(self._ranks, mine)
        self._work, self._data, self._steps = 0.0, 0.0, 0
        self._is_first = True

    def add(self, work_seconds: float, data_seconds: float) -> None:
        if self._is_first:  # includes compilation, loading, connecting
            self._is_first = False
            return
        self._work += work_seconds
        self._data += data_seconds
        self._steps += 1

    def report(self) -> tuple[dict[str, float], list[str]]:
        """(numbers for the metrics row, lines about slow ranks), the same on every rank. A collective."""
        if self._steps < MIN_STEPS:
            return {}, []
        steps = self._steps
        mine = torch.tensor([self._work / steps, self._data / steps], dtype=torch.float64, device=self.layout.device)
        self._work, self._data, self._steps = 0.0, 0.0, 0
        if self.layout.world == 1:
            return {"work_seconds": float(mine[0]), "data_seconds": float(mine[1])}, []
        gathered = [torch.empty_like(mine) for _ in range(self.layout.world)]
        dist.all_gather(gathered, mine)
        return compare([tuple(times.tolist()) for times in gathered], self._ranks, steps, self.ratio)


def compare(times: list[tuple[float, float]], who: list[tuple[int, int, str]], steps: int,
            ratio: float) -> tuple[dict[str, float], list[str]]:
    """(numbers for the metrics row, lines about slow ranks).

    times: (work, data) seconds per step of each rank. who: (pipeline rank, tensor rank, host) of each. steps: that were
    measured. ratio: to the peers' median, above which a rank is reported.
    """
    peers: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank, (stage, shard, _) in enumerate(who):
        peers[stage, shard].append(rank)
    own = [work + data for work, data in times]
    worst, lines = 1.0, []
    for ranks in peers.values():
        # the lower median: of two ranks the faster one is the reference
        usual = statistics.median_low(own[rank] for rank in ranks)
        for rank in ranks:
            share = own[rank] / max(usual, 1e-9)
            worst = max(worst, share)
            if share > ratio:
                lines.append(f"slow | rank {rank} on {who[rank][2]}: {share:.2f}x its peers' work over {steps} steps "
                             f"({1e3 * times[rank][0]:.0f} ms computing, {1e3 * times[rank][1]:.0f} ms for data)")
    row = {"work_seconds": max(work for work, _ in times), "data_seconds": max(data for _, data in times),
           "slowest_rank_ratio": worst}
    return row, lines
