"""From a profiler's trace to the time of every part of a step.

A trace (torch.profiler's export_chrome_trace) has, per CPU thread, nested events: our "part: ..." ranges
(part_ranges.py), operations, and launches; and the work on the device, tied to its launch by a correlation number.
The part of a kernel is that of the innermost event around its launch that has one: a range, or a backward
operation, which has the part of the forward operation that an arrow of the trace ties it to.

The parts add up to the step. Where several kernels run at once the moment is shared by those that compute;
communication counts only for the moments in which nothing else runs ("communication"), the rest is listed separately
("hidden communication"), and "idle" is when nothing runs at all.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hola_megatron.profile.part_ranges import PREFIX, REST, STEP

COMMUNICATION, IDLE = "communication", "idle"
_NESTED = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ENGINE = "autograd::engine::evaluate_function"
_ACCUMULATE = "AccumulateGrad"


@dataclass(frozen=True)
class Work:
    """Something that ran: microseconds from start to end, on the device (on the CPU where there is none).

    number: of the call; an operation that calls others runs in several stretches.
    """

    number: int
    name: str
    part: str
    start: float
    end: float


@dataclass(frozen=True)
class PartTimes:
    """Milliseconds of one step. parts (with communication and idle) add up to `step`; hidden is on top."""

    step: float
    parts: dict[str, float]
    hidden_communication: float
    work: list[Work]

    @property
    def busy(self) -> float:
        return self.step - self.parts[IDLE]


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, packed with gzip or not."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(text)["traceEvents"]


def part_times(events: list[dict[str, Any]]) -> PartTimes:
    """Time by part inside the one range STEP of a trace."""
    threads = _Threads(events)
    step = next(e for e in events if e.get("cat") == "user_annotation" and e["name"] == STEP)
    start, end = step["ts"], step["ts"] + step["dur"]
    work = [w for w in _work(events, threads) if w.end > start and w.start < end]
    parts, hidden = _share(work, start, end)
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1]))
    return PartTimes((end - start) / 1e3, {n: t / 1e3 for n, t in ordered.items()}, hidden / 1e3, work)


def _work(events: list[dict[str, Any]], threads: _Threads) -> list[Work]:
    on_device = [e for e in events if e.get("cat") in _DEVICE and e["ph"] == "X"]
    if not on_device:
        return threads.own_times()
    launches = {e["args"]["correlation"]: i for i, e in enumerate(threads.events)
                if e["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})}
    return [Work(i, e["name"], _part_of_device_work(e, launches, threads), e["ts"], e["ts"] + e["dur"])
            for i, e in enumerate(on_device)]


def _part_of_device_work(event: dict[str, Any], launches: dict[int, int], threads: _Threads) -> str:
    if _is_communication(event["name"]):
        return COMMUNICATION
    at = launches.get(event["args"].get("correlation"))
    return threads.part(at) if at is not None else REST


def _is_communication(name: str) -> bool:
    lower = name.lower()
    return "nccl" in lower or lower.startswith(("c10d::", "gloo:"))


def _share(work: list[Work], start: float, end: float) -> tuple[dict[str, float], float]:
    """(time by part, whose sum is end - start; time of communication overlapped by other work)."""
    edges = [(max(w.start, start), 1, w.part) for w in work] + [(min(w.end, end), -1, w.part) for w in work]
    times: dict[str, float] = defaultdict(float)
    active: dict[str, int] = defaultdict(int)
    hidden, before = 0.0, start
    for at, change, part in sorted([*edges, (end, 0, REST)]):
        computing = {name: n for name, n in active.items() if n and name != COMMUNICATION}
        span = at - before
        if computing:
            for name, n in computing.items():
                times[name] += span * n / sum(computing.values())
            hidden += span if active[COMMUNICATION] else 0.0
        else:
            times[COMMUNICATION if active[COMMUNICATION] else IDLE] += span
        active[part] += change
        before = at
    times[IDLE] += 0.0
    return dict(times), hidden


def covered(spans: list[tuple[float, float]]) -> float:
    """How much of the line the (start, end) cover together."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


class _Threads:
    """The nested events of all CPU threads: what encloses what, and what part each belongs to."""

    def __init__(self, events: list[dict[str, Any]]):
        nested = [e for e in events if e.get("cat") in _NESTED and e["ph"] == "X"]
        self.events = sorted(nested, key=lambda e: (str(e["pid"]), str(e["tid"]), e["ts"], -e["dur"]))
        self.parents: list[int | None] = []
        open_: list[int] = []
        for i, event in enumerate(self.events):
            while open_ and not self._encloses(open_[-1], event):
                open_.pop()
            self.parents.append(open_[-1] if open_ else None)
            open_.append(i)
        self._forward = self._forward_of(events)
        self._parts: dict[int, str] = {}

    def _encloses(self, outer: int, event: dict[str, Any]) -> bool:
        other = self.events[outer]
        same = (other["pid"], other["tid"]) == (event["pid"], event["tid"])
        return same and event["ts"] < other["ts"] + other["dur"]

    def _forward_of(self, events: list[dict[str, Any]]) -> dict[int, int]:
        """The forward operation of every backward one, by the trace's arrows."""
        at = {(e["pid"], e["tid"], e["ts"]): i for i, e in enumerate(self.events) if e["cat"] == "cpu_op"}
        ends: dict[Any, dict[str, int]] = defaultdict(dict)
        for e in events:
            if e.get("cat") == "fwdbwd" and (index := at.get((e["pid"], e["tid"], e["ts"]))) is not None:
                ends[e["id"]][e["ph"]] = index
        found = {}
        for arrow in ends.values():
            if len(arrow) == 2:
                backward, forward = arrow["f"], arrow["s"]
                found[backward] = forward
                around = self.parents[backward]  # the engine's own frame sums gradients of several uses
                if around is not None and self.events[around]["name"].startswith(_ENGINE):
                    found[around] = forward
        return found

    def part(self, at: int | None) -> str:
        """The part of the innermost event from `at` outwards that has one."""
        path = []
        while at is not None and at not in self._parts:
            path.append(at)
            at = self.parents[at]
        found = REST if at is None else self._parts[at]
        for i in reversed(path):
            found = self._parts[i] = self._own_part(i) or found
        return found

    def _own_part(self, at: int) -> str | None:
        event = self.events[at]
        name = event["name"]
        if event["cat"] == "user_annotation":
            return name.removeprefix(PREFIX) if name.startswith(PREFIX) and name != STEP else None
        if at in self._forward:
            part = self.part(self._forward[at])
            return part if part != REST else None
        return "gradient accumulation" if _ACCUMULATE in name else None

    def own_times(self) -> list[Work]:
        """On a machine without a device: the stretches of every operation in which no other runs inside it."""
        children: dict[int, list[dict[str, Any]]] = defaultdict(list)
        is_work = [e["cat"] == "cpu_op" and not e["name"].startswith(_ENGINE) for e in self.events]
        for i, parent in enumerate(self.parents):
            if parent is not None:
                children[parent].append(self.events[i])
        work = []
        for i, event in enumerate(self.events):
            if not is_work[i]:
                continue
            part, at = COMMUNICATION if _is_communication(event["name"]) else self.part(i), event["ts"]
            for child in [*children[i], {"ts": event["ts"] + event["dur"], "dur": 0}]:
                if child["ts"] > at:
                    work.append(Work(i, event["name"], part, at, child["ts"]))
                at = max(at, child["ts"] + child["dur"])
        return work
