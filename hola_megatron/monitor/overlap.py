"""How much of every message's time on the GPU other work ran beside it, from a profiler's trace of a step.

A message's kernel runs from when it is launched on its rank until the last byte is there, so its time includes
waiting for the slowest rank. "Hidden" is the share of it in which at least one kernel or copy of this rank's own
work ran on the same GPU; the rest is what the step pays for it.

Kernels are told apart by what torch's profiler notes of a collective (its name, elements and dtype), matched with
the messages that `parallel.collectives.counted` saw; messages of others (gradients, parameters) keep NCCL's name.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from hola_megatron.parallel.collectives import Sent

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
KINDS = {"allgather": "all-gather", "reducescatter": "reduce-scatter", "sendrecv": "shift", "allreduce": "all-reduce",
         "broadcast": "broadcast"}
BYTES = {"Byte": 1, "Char": 1, "Bool": 1, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8, "Double": 8}


@dataclass(frozen=True)
class Overlap:
    """All messages of one sort in a trace. Times in microseconds; hidden: beside other work on the same GPU."""

    what: str
    count: int
    total: float
    hidden: float

    @property
    def share(self) -> float:
        return self.hidden / self.total if self.total else 1.0


def overlaps(events: Iterable[dict[str, Any]], sent: list[Sent]) -> list[Overlap]:
    """One row for each sort of message in the trace of one rank, the longest in sum first."""
    on_device = [e for e in events if e.get("cat") in DEVICE and e.get("ph") == "X"]
    work = _Union([(e["ts"], e["ts"] + e["dur"]) for e in on_device if not _is_message(e)])
    names, found = _names(sent), defaultdict(list)
    for event in on_device:
        if _is_message(event):
            begin, end = event["ts"], event["ts"] + event["dur"]
            found[_what(event, names)].append((end - begin, work.within(begin, end)))
    rows = [Overlap(what, len(times), sum(t for t, _ in times), sum(h for _, h in times))
            for what, times in found.items()]
    return sorted(rows, key=lambda row: -row.total)


def table(ranks: list[list[Overlap]]) -> str:
    """Rows of all ranks as one table: every sort of message, over all ranks and on the rank that hides least."""
    rows: dict[str, list[Overlap]] = defaultdict(list)
    for rank in ranks:
        for row in rank:
            rows[row.what].append(row)
    lines = ["| message | a rank and step | mean us | hidden | at the worst rank | not hidden, ms a step |",
             "|---|---|---|---|---|---|"]
    for what, found in sorted(rows.items(), key=lambda item: -sum(row.total for row in item[1])):
        total, hidden, count = (sum(getattr(row, name) for row in found) for name in ("total", "hidden", "count"))
        worst = min(row.share for row in found)
        lines.append(f"| {what} | {count / len(found):.0f} | {total / count:.0f} | {100 * hidden / total:.0f} % | "
                     f"{100 * worst:.0f} % | {(total - hidden) / len(found) / 1e3:.2f} |")
    return "\n".join(lines)


class _Union:
    """The union of intervals, for asking how much of another one it covers."""

    def __init__(self, intervals: list[tuple[float, float]]):
        self.begins: list[float] = []
        self.ends: list[float] = []
        for begin, end in sorted(intervals):
            if self.ends and begin <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.begins.append(begin)
                self.ends.append(end)
        self.before = [0.0, *accumulate(e - b for b, e in zip(self.begins, self.ends, strict=True))]

    def within(self, begin: float, end: float) -> float:
        """Length of the union inside [begin, end]."""
        first, last = bisect_right(self.ends, begin), bisect_left(self.begins, end)
        if first >= last:
            return 0.0
        outside = max(begin - self.begins[first], 0.0) + max(self.ends[last - 1] - end, 0.0)
        return self.before[last] - self.before[first] - outside


def _is_message(event: dict[str, Any]) -> bool:
    return "nccl" in event["name"].lower()


def _kind(kernel: str) -> str:
    lower = kernel.lower().replace("_", "")
    return next((kind for mark, kind in KINDS.items() if mark in lower), kernel[:40])


def _names(sent: list[Sent]) -> dict[tuple[str, int], str]:
    """(kind, bytes a rank puts in) -> what; several of one size are named together."""
    names: dict[tuple[str, int], dict[str, None]] = defaultdict(dict)
    for message in sent:
        names[message.kind, message.payload][message.what] = None
    return {key: f"{key[0]}: {' or '.join(whats)}" for key, whats in names.items()}


def _what(event: dict[str, Any], names: dict[tuple[str, int], str]) -> str:
    arguments, kind = event.get("args", {}), _kind(event["name"])
    size = BYTES.get(arguments.get("dtype"), 0) * int(arguments.get("In msg nelems") or 0)
    if kind == "shift":  # several buffers in one kernel: sizes are not noted
        whats = dict.fromkeys(name.removeprefix("shift: ") for (k, _), name in names.items() if k == "shift")
        return f"shift: {' or '.join(whats)}" if whats else kind
    return names.get((kind, size), f"{kind}, {size / 1e6:.1f} MB" if size else kind)
