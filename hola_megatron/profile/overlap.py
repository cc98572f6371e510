"""The fraction of every message's GPU time that overlaps with other work, from a profiler's trace of a step.

A message's kernel runs from when it is launched on its rank until the last byte is there, so its time includes
waiting for the slowest rank. "Hidden" is the share of it in which at least one kernel or copy of this rank's own
work ran on the same GPU; the rest is what the step pays for it.

What of that is the message itself: the rank that arrives last waits for nobody, so the shortest of all ranks' kernels
of one message is its transfer. Its hidden share is that on this last rank: the others wait for it, whatever they do
meanwhile. An estimate of what the message itself costs a step, not a bound: the last rank at one message may be
early at the next. Ranks' clocks may differ. The kernels of a shift wait for neighbours only; no estimate is
made for them.

Kernels are distinguished by the profiler's record of a collective (its name, elements and dtype), matched with
the messages that `parallel.collectives.counted` saw; messages of others (gradients, parameters) keep NCCL's name.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hola_megatron.parallel.collectives import Sent

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
KINDS = {"allgather": "all-gather", "reducescatter": "reduce-scatter", "sendrecv": "shift", "allreduce": "all-reduce",
         "broadcast": "broadcast"}
BYTES = {"Byte": 1, "Char": 1, "Bool": 1, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8, "Double": 8}


@dataclass(frozen=True)
class Message:
    """One message on one rank: its kernel's microseconds, and those of them when nothing else ran."""

    length: float
    bare: float

    @property
    def hidden(self) -> float:
        """Microseconds that overlap with other work."""
        return self.length - self.bare


@dataclass(frozen=True)
class Overlap:
    """All messages of one kind in a trace, in order. Times in microseconds; hidden: overlapped by other work."""

    what: str
    messages: tuple[Message, ...]

    @property
    def count(self) -> int:
        return len(self.messages)

    @property
    def total(self) -> float:
        return sum(message.length for message in self.messages)

    @property
    def hidden(self) -> float:
        return sum(message.hidden for message in self.messages)

    @property
    def share(self) -> float:
        return self.hidden / self.total if self.total else 1.0


def overlaps(events: Iterable[dict[str, Any]], sent: list[Sent]) -> list[Overlap]:
    """One row for each sort of message in the trace of one rank, the longest in sum first."""
    on_device = sorted((e for e in events if e.get("cat") in DEVICE and e.get("ph") == "X"), key=lambda e: e["ts"])
    work = _Union([(e["ts"], e["ts"] + e["dur"]) for e in on_device if not _is_message(e)])
    names, found = _names(sent), defaultdict(list)
    for event in on_device:
        if _is_message(event):
            start, end = event["ts"], event["ts"] + event["dur"]
            found[_what(event, names)].append(Message(end - start, work.uncovered(start, end)))
    rows = [Overlap(what, tuple(messages)) for what, messages in found.items()]
    return sorted(rows, key=lambda row: -row.total)


def transfer(ranks: list[Overlap]) -> tuple[float, float] | None:
    """(mean microseconds, hidden share on the last rank) of the transfers of one sort of message, from all ranks' rows.

    None for shifts, and where the ranks did not see equally many: they cannot be matched.
    """
    if len({row.count for row in ranks}) > 1 or ranks[0].what.startswith("shift"):
        return None
    last = [min(together, key=lambda message: message.length)
            for together in zip(*(row.messages for row in ranks), strict=True)]
    total, hidden = sum(message.length for message in last), sum(message.hidden for message in last)
    return total / len(last), hidden / total if total else 1.0


def table(ranks: list[list[Overlap]]) -> str:
    """Rows of all ranks as one table: every sort of message, over all ranks and on the rank that hides least."""
    rows: dict[str, list[Overlap]] = defaultdict(list)
    for rank in ranks:
        for row in rank:
            rows[row.what].append(row)
    lines = ["| message | a rank and step | mean us | hidden | at the worst rank | not hidden, ms a step | "
             "transfer us | of it hidden |", "|---|---|---|---|---|---|---|---|"]
    for what, found in sorted(rows.items(), key=lambda item: -sum(row.total for row in item[1])):
        total, hidden, count = (sum(getattr(row, name) for row in found) for name in ("total", "hidden", "count"))
        worst = min(row.share for row in found)
        alone = transfer(found) if len(found) == len(ranks) else None
        shown = "- | -" if alone is None else f"{alone[0]:.0f} | {100 * alone[1]:.0f} %"
        lines.append(f"| {what} | {count / len(found):.0f} | {total / count:.0f} | {100 * hidden / total:.0f} % | "
                     f"{100 * worst:.0f} % | {(total - hidden) / len(found) / 1e3:.2f} | {shown} |")
    return "\n".join(lines)


class _Union:
    """The union of intervals, for asking what of another one it leaves out."""

    def __init__(self, intervals: list[tuple[float, float]]):
        self.starts: list[float] = []
        self.ends: list[float] = []
        for start, end in sorted(intervals):
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.starts.append(start)
                self.ends.append(end)

    def uncovered(self, start: float, end: float) -> float:
        """The time of [start, end] outside of the union."""
        covered = 0.0
        for i in range(bisect_right(self.ends, start), bisect_left(self.starts, end)):
            covered += min(self.ends[i], end) - max(self.starts[i], start)
        return end - start - covered


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
