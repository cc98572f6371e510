"""What was found out about several nodes: the table, and one line for everything that is wrong with them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hola_megatron.doctor.between import Pair

CLOCK_SECONDS = 1.0  # owners of folders, logs and tokens of remote storage compare times of nodes
SLOW_BANDWIDTH, SLOW_LATENCY = 0.5, 3.0  # share of the nodes' median below or above which a node is named


@dataclass
class Node:
    """What is known of a node. clock: seconds ahead of the first node. pairs: of all its ranks, by the other node."""

    name: str
    ranks: list[int]
    facts: Mapping[str, str]
    clock: float | None = None
    pairs: dict[int, list[Pair]] = field(default_factory=lambda: defaultdict(list))

    def latency(self, peer: int) -> float:
        return statistics.median_low(pair.latency for pair in self.pairs[peer])

    def bandwidth(self, peer: int) -> float:
        """Bytes a second of all its ranks together."""
        return sum(pair.bytes_per_second for pair in self.pairs[peer])

    # of two peers the better one counts: with a bad one among two it is not this node that is slow
    @property
    def usual_latency(self) -> float:
        return statistics.median_low(map(self.latency, self.pairs))

    @property
    def usual_bandwidth(self) -> float:
        return statistics.median_high(map(self.bandwidth, self.pairs))


def difference_problems(nodes: Sequence[Node]) -> list[str]:
    """One line for every fact that is not equal on all nodes."""
    problems = []
    for name in sorted({name for node in nodes for name in node.facts}):
        having: dict[str, list[str]] = defaultdict(list)
        for node in nodes:
            having[node.facts.get(name, "nothing")].append(node.name)
        if len(having) > 1:
            rarest_first = sorted(having.items(), key=lambda item: len(item[1]))
            values = "; ".join(f"{value} on {_some(names)}" for value, names in rarest_first)
            problems.append(f"{name}: {values}; make it equal on all nodes")
    return problems


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def clock_problems(nodes: Sequence[Node]) -> list[str]:
    """One line for every clock that differs from the first node's."""
    return [f"{node.name}: its clock is {abs(node.clock):.1f} s {'ahead of' if node.clock > 0 else 'behind'} "
            f"{nodes[0].name}'s; set both by a time server (chronyc tracking)"
            for node in nodes if node.clock is not None and abs(node.clock) > CLOCK_SECONDS]


def speed_problems(nodes: Sequence[Node], min_bandwidth: float | None) -> list[str]:
    """One line for every node, and every link of other nodes, that is slow beside the rest or below `min_bandwidth`."""
    measured = [node for node in nodes if node.pairs]
    if not measured:
        return []
    latency = statistics.median_low(node.usual_latency for node in measured)
    bandwidth = statistics.median_high(node.usual_bandwidth for node in measured)
    problems, slow = [], set()
    for node in measured:
        if node.usual_bandwidth < SLOW_BANDWIDTH * bandwidth or node.usual_latency > SLOW_LATENCY * latency:
            slow.add(node.name)
            found = _speed(node.usual_latency, node.usual_bandwidth)
            problems.append(f"{node.name}: slow to all other nodes: {found}, the nodes' median is "
                            f"{_speed(latency, bandwidth)}; look at its network card and cable, or leave it out: "
                            f"sbatch --exclude={node.name}")
    least = 0.0 if min_bandwidth is None else min_bandwidth * 1e9
    for number, node in enumerate(nodes):
        for peer in sorted(peer for peer in node.pairs if peer > number):
            found, usual = node.bandwidth(peer), min(node.usual_bandwidth, nodes[peer].usual_bandwidth)
            if {node.name, nodes[peer].name} & slow or not (found < least or found < SLOW_BANDWIDTH * usual):
                continue
            wanted = f"{least / 1e9:g} GB/s asked for" if found < least else f"usual for them is {usual / 1e9:.3g} GB/s"
            problems.append(f"{node.name} and {nodes[peer].name}: {found / 1e9:.3g} GB/s between them, {wanted}; look "
                            "at the link, and at what `NCCL_DEBUG=INFO` says about the network in use")
    return problems


def _speed(latency: float, bandwidth: float) -> str:
    return f"{1e6 * latency:.0f} us and {bandwidth / 1e9:.3g} GB/s"


def print_nodes(nodes: Sequence[Node], of_all: Sequence[Sequence[Any]]) -> None:
    """The table of nodes, and a line about all ranks. of_all: (bytes, seconds, whether right)."""
    width = max(len(node.name) for node in nodes)
    print(f"{'node':>{width}}  ranks  clock ms  latency us, slowest peer       GB/s, slowest peer", flush=True)
    for node in nodes:
        clock = "-" if node.clock is None else f"{1e3 * node.clock:+.1f}"
        row = f"{node.name:>{width}}  {len(node.ranks):5}  {clock:>8}"
        if node.pairs:
            worst, least = max(node.pairs, key=node.latency), min(node.pairs, key=node.bandwidth)
            row += (f"  {1e6 * node.usual_latency:10.0f}  {1e6 * node.latency(worst):6.0f} {nodes[worst].name:<{width}}"
                    f"  {node.usual_bandwidth / 1e9:9.3g}  {node.bandwidth(least) / 1e9:6.3g} {nodes[least].name}")
        print(row, flush=True)
    ranks = sum(len(node.ranks) for node in nodes)
    sizes = []
    for size, seconds, right in of_all:
        rate = 2 * (ranks - 1) / ranks * size / seconds / 1e9
        speed = f"{size} bytes {1e6 * seconds:.0f} us" if size < 2**20 else \
            f"{size / 2**20:.0f} MiB {1e3 * seconds:.2f} ms ({rate:.3g} GB/s a rank)"
        sizes.append(speed + ("" if right else " WRONG SUM"))
    print(f"all-reduce over {ranks} ranks: {', '.join(sizes) or 'failed'}", flush=True)
