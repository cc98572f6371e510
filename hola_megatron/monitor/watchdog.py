"""A rank that hangs or dies ends the run, and is named.

Every rank tells the job's store, from a thread, that it lives and where its main thread is. A
rank whose own main thread has made no progress for `parallel.hang_seconds` compares what all
ranks said, names the odd one out, writes its stacks to the run folder and ends with code 76;
the launcher then ends the others. Liveness is judged by counters, so clocks need not agree.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hola_megatron.errors import EXIT_LOST, LostError
from hola_megatron.parallel.groups import Layout

STORE_TIMEOUT = datetime.timedelta(seconds=10)
STORE_GONE = "the job's store cannot be reached: the machine of rank 0 or its launcher died"
# where a rank's main thread stands while it waits for its peers: torch's and Megatron's files of collectives,
# and the functions of ours that read a result of one back from the device
WAITING_FILES = ("distributed_c10d.py", "p2p_communication.py")
WAITING = {("megatron.py", "_sum_over_ranks"), ("megatron.py", "_all_agree"), ("groups.py", "agree"),
           ("groups.py", "on_main"), ("clip_grads.py", "get_grad_norm_fp32")}
GO_ON = "start the same command again to go on from the newest checkpoint"


class Watchdog:
    """`mark` progress from the main thread; `lost_peer` explains a collective that failed."""

    def __init__(self, layout: Layout, folder: Path, limit_seconds: float | None):
        self.rank, self.world, self.folder, self.limit = layout.rank, layout.world, folder, limit_seconds
        self.interval = min(max((limit_seconds or 50) / 10, 0.2), 5.0)
        self._main = threading.main_thread().ident
        self._mark = (0, "start", time.monotonic())
        self._count = 0
        self._stop = threading.Event()
        self._store = _connect() if self.world > 1 else None
        self._store_failed = False
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def mark(self, step: int, phase: str, *, patient: bool = False) -> None:
        """The main thread is alive and begins `phase` ("step", "valid", "save", ...) after `step` finished steps.

        patient: a phase that may take longer than the limit; only `parallel.timeout_minutes` ends it.
        """
        self._mark = (step, phase, math.inf if patient else time.monotonic())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(2 * self.interval)

    def lost_peer(self) -> LostError | None:
        """Called when a collective raised: an error naming the ranks no longer heard of, if there are any."""
        if self._store is None:
            return None
        seen = self._compare()
        if self._store_is_gone(seen):
            return LostError(f"{self.folder}: {STORE_GONE} after step {self._mark[0]:,}; {GO_ON}")
        silent = self._silent(seen)
        if not silent:
            return None
        step = self._mark[0]
        return LostError(f"{self.folder}: {_ranks(silent)} {'has' if len(silent) == 1 else 'have'} died "
                         f"(not heard of for {2 * self.interval:.0f} s) after step {step:,}; the log of "
                         f"{'it' if len(silent) == 1 else 'each'} says why, if it could; {GO_ON}")

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._beat()
            if self.limit is not None and time.monotonic() - self._mark[2] > self.limit:
                self._end()

    def _beat(self) -> None:
        self._count += 1
        step, phase, _ = self._mark
        where, waits = self._where()
        said = {"count": self._count, "step": step, "phase": phase, "where": where, "waits": waits,
                "host": socket.gethostname()}
        self._last = said
        if self._store is not None and not self._store_failed:
            try:
                self._store.set(_key(self.rank), json.dumps(said))
            except RuntimeError:  # its machine is gone; the collectives will notice too, and torch warns each time
                self._store_failed = True

    def _where(self) -> tuple[str, bool]:
        """The main thread's place, and whether that is a place where it waits for other ranks."""
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "nowhere", False
        place = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        waits = False
        while frame is not None and not waits:
            waits = (Path(frame.f_code.co_filename).name, frame.f_code.co_name) in WAITING \
                or Path(frame.f_code.co_filename).name in WAITING_FILES
            frame = frame.f_back
        return place, waits

    def _compare(self) -> dict[int, tuple[dict[str, Any] | None, bool]]:
        """{rank: (what it said last, whether it is still alive)}, from two looks two intervals apart."""
        first = self._read_all()
        deadline = time.monotonic() + 2 * self.interval + 0.5
        while time.monotonic() < deadline:
            time.sleep(self.interval / 2)
            self._beat()
        second = self._read_all()
        return {rank: (second[rank], second[rank] is not None and first[rank] != second[rank])
                for rank in range(self.world)}

    def _read_all(self) -> dict[int, dict[str, Any] | None]:
        found: dict[int, dict[str, Any] | None] = {}
        for rank in range(self.world):
            try:
                known = self._store.check([_key(rank)])
                found[rank] = json.loads(self._store.get(_key(rank))) if known else None
            except RuntimeError:
                found[rank] = None
        return found

    def _store_is_gone(self, seen: dict[int, tuple[dict[str, Any] | None, bool]]) -> bool:
        """Not even one's own word can be read."""
        return seen[self.rank][0] is None

    @staticmethod
    def _silent(seen: dict[int, tuple[dict[str, Any] | None, bool]]) -> list[int]:
        return [rank for rank, (_, alive) in seen.items() if not alive]

    def _end(self) -> None:
        """Name the culprit and leave; the first rank that is alive speaks for all."""
        seen = self._compare() if self._store is not None else {self.rank: (self._last, True)}
        self._dump_stacks()
        alive = [rank for rank, (_, is_alive) in seen.items() if is_alive]
        if self.rank == min(alive, default=self.rank):
            why = STORE_GONE if self._store is not None and self._store_is_gone(seen) else blame(seen)
            text = f"{self.folder}: no progress for {self.limit:.0f} s after step {self._mark[0]:,}: " \
                   f"{why}; stacks are in {self.folder / 'hang'}; {GO_ON}"
            print(f"LostError: {text}", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * self.interval)  # the launcher ends everyone when one leaves: let the speaker speak
        os._exit(EXIT_LOST)

    def _dump_stacks(self) -> None:
        try:
            (self.folder / "hang").mkdir(parents=True, exist_ok=True)
            with (self.folder / "hang" / f"rank-{self.rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError:
            pass


def blame(seen: dict[int, tuple[dict[str, Any] | None, bool]]) -> str:
    """Which ranks are the odd ones out: the silent, else those furthest behind, else those that do not wait for
    others, else the smallest group by place."""
    silent = [rank for rank, (_, alive) in seen.items() if not alive]
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for rank, (said, alive) in seen.items():
        if alive:
            groups[said["step"], said["waits"], said["phase"], said["where"]].append(rank)
    # (steps, whether it waits for others, how many ranks): the culprit is first, if there is one
    ordered = sorted(groups.items(), key=lambda item: (*item[0][:2], len(item[1])))
    suspicion = [(*key[:2], len(ranks)) for key, ranks in ordered]
    told = not silent and len(ordered) > 1 and suspicion[0] != suspicion[1]
    parts = []
    if silent:
        hosts = sorted({said["host"] for said, alive in seen.values() if said and not alive})
        parts.append(f"{_ranks(silent)} no longer answers" + (f" (on {', '.join(hosts)})" if hosts else ""))
    for number, ((step, _, phase, where), ranks) in enumerate(ordered):
        verb = "hangs" if number == 0 and told else "waits"
        host = f" on {seen[ranks[0]][0]['host']}" if verb == "hangs" and len(ranks) == 1 else ""
        parts.append(f"{_ranks(ranks)}{host} {verb} in {where}, {phase}, after step {step:,}")
    if not silent and not told and len(seen) > 1:
        parts.append("which of them hangs cannot be told")
    return "; ".join(parts)


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _key(rank: int) -> str:
    return f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _connect() -> dist.TCPStore:
    """A connection of our own: the one of the process group may be held by a waiting call."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         wait_for_workers=False, timeout=STORE_TIMEOUT)
