"""Measurements between nodes: the clocks, and all-reduces of all ranks and of every pair of nodes.

In a pair the ranks of equal local rank reduce with each other, all at the same time, so that every network card of a
node is used. Of a number of repetitions the best counts: other load on a node delays some of them, a bad link all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOST_ROUNDS = 15  # peers that a node is measured with; each costs a communicator
CLOCK_REPEATS, LATENCY_REPEATS, BANDWIDTH_REPEATS = 8, 30, 5
LATENCY_ELEMENTS = 2  # 8 bytes of float32


@dataclass(frozen=True)
class Pair:
    """What one rank measured with the rank of equal local rank on another node.

    latency: seconds of an all-reduce of 8 bytes. bytes_per_second: of a large one. right: whether the sums were.
    """

    peer: int
    latency: float
    bytes_per_second: float
    right: bool


def wall_clock() -> float:
    """Seconds since 1970, by this node's clock."""
    return time.time()


def clock_offset(store: Any, node: int) -> float:
    """Seconds by which this node's clock is ahead of the first node's. Called by one rank of node `node` (not 0).

    Each repetition asks rank 0 for its time through the store; the answer to the fastest one counts, and is wrong by at
    most half of its duration. Meanwhile rank 0 is in `answer_clocks`.
    """
    best, offset = float("inf"), 0.0
    for number in range(CLOCK_REPEATS):
        before = wall_clock()
        store.set(f"clock/{node}/{number}/asked", "")
        first = float(store.get(f"clock/{node}/{number}/time"))
        after = wall_clock()
        if after - before < best:
            best, offset = after - before, (before + after) / 2 - first
    return offset


def answer_clocks(store: Any, nodes: int) -> None:
    """Tell every other node the time, one after the other. Called by rank 0. Waits for each as long as the store."""
    for node in range(1, nodes):
        for number in range(CLOCK_REPEATS):
            store.get(f"clock/{node}/{number}/asked")
            store.set(f"clock/{node}/{number}/time", repr(wall_clock()))


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of nodes in rounds, each node once a round, each pair once in all; at most MOST_ROUNDS rounds."""
    count = nodes + nodes % 2
    ring = list(range(count))
    found = []
    for _ in range(min(count - 1, MOST_ROUNDS)):
        pairs = [(ring[i], ring[count - 1 - i]) for i in range(count // 2)]
        found.append([(min(pair), max(pair)) for pair in pairs if max(pair) < nodes])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def measure_pairs(node: int, ranks_of: list[list[int]], device: torch.device, megabytes: int) -> list[Pair]:
    """Measure this rank's node with the others. Every rank calls it.

    Args:
        node: index of this rank's node.
        ranks_of: ranks of every node, as many on each.
        device: of the tensors.
        megabytes: MiB of a large all-reduce.
    """
    local = ranks_of[node].index(dist.get_rank())
    found = []
    for pairs in rounds(len(ranks_of)):
        mine = next((pair for pair in pairs if node in pair), None)
        if mine is None:
            continue
        members = [ranks_of[each][local] for each in mine]
        # of the two members only; of all ranks it would have to be made for every pair
        group = dist.new_group(members, use_local_synchronization=True)
        small, right = time_all_reduce(LATENCY_ELEMENTS, LATENCY_REPEATS, device, group)
        large, also_right = time_all_reduce(megabytes * 2**18, BANDWIDTH_REPEATS, device, group)
        dist.destroy_process_group(group)
        peer = mine[0] if mine[1] == node else mine[1]
        found.append(Pair(peer, small, megabytes * 2**20 / large, right and also_right))
    return found


def time_all_reduce(elements: int, repeats: int, device: torch.device,
                    group: dist.ProcessGroup | None = None) -> tuple[float, bool]:
    """(seconds of the fastest of `repeats`, whether the sums are right), of that many float32; after a warm-up."""
    ranks = dist.get_world_size(group)
    x = torch.full((elements,), float(dist.get_rank(group) + 1), device=device)
    dist.all_reduce(x, group=group)
    right = bool((x == ranks * (ranks + 1) / 2).all())
    best = float("inf")
    for _ in range(repeats):
        x.fill_(1.0)
        _wait(x)
        began = time.perf_counter()
        dist.all_reduce(x, group=group)
        _wait(x)
        best = min(best, time.perf_counter() - began)
    return best, right and bool((x == ranks).all())


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
