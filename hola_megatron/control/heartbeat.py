"""Reports of every rank in the job's TCPStore, which the other ranks read.

It runs in a thread of its own, since a store that does not answer blocks its caller. Liveness is decided by counters,
so clocks of nodes may differ.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

STORE_TIMEOUT = datetime.timedelta(seconds=10)
ANSWER_SECONDS = 20.0  # a store on another node that has not answered for so long is lost with its node

Seen = dict[int, tuple[dict[str, Any] | None, bool]]


class Heartbeat:
    """Writes this rank's report to the store once per interval (seconds).

    report: returns this rank's values, for JSON. on_lost: called once, from the thread, when the store is lost.
    """

    def __init__(self, rank: int, world: int, interval: float, report: Callable[[], dict[str, Any]],
                 on_lost: Callable[[], None]):
        self.rank, self.world, self.interval = rank, world, interval
        self.lost = False
        self._report, self._on_lost, self._count = report, on_lost, 0
        self._identity = {"host": socket.gethostname(), "pid": os.getpid(), "namespace": _pid_namespace()}
        self._stop = threading.Event()
        self._silent_seconds = 0.0
        self._store = _connect()
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(2 * self.interval)

    def tick(self) -> None:
        """Call once per interval while this process runs; time in which it was suspended is not counted."""
        self._silent_seconds += self.interval
        # on the launcher's node its end is noticed at once, and a suspended launcher (Ctrl-Z) has not ended
        if self._silent_seconds > ANSWER_SECONDS and os.environ.get("GROUP_RANK", "0") != "0":
            self._give_up()

    def _run(self) -> None:
        while not self._stop.wait(self.interval) and not self.lost:
            try:
                self._write()
            except RuntimeError:
                self._reconnect()

    def _write(self) -> None:
        self._count += 1
        self._store.set(_key(self.rank), json.dumps({"count": self._count, **self._identity, **self._report()}))
        self._store.check([_key(self.rank)])  # `set` does not wait for an answer
        self._silent_seconds = 0.0

    def _reconnect(self) -> None:
        try:
            self._store = _connect()
        except RuntimeError:
            self._give_up()

    def _give_up(self) -> None:
        if not self.lost and not self._stop.is_set():
            self.lost = True
            self._on_lost()

    def compare(self) -> Seen | None:
        """{rank: (its last report, whether it is alive)}, from two reads some intervals apart; None: no store.

        Returns early when all are alive, or the process of every silent rank is known to have ended.
        """
        box: list[Seen] = []

        def look() -> None:
            try:
                box.append(self._look())
            except RuntimeError:
                return

        if self.lost:
            return None
        thread = threading.Thread(target=look, name="comparing ranks", daemon=True)
        thread.start()
        thread.join(3 * self.look_seconds + STORE_TIMEOUT.total_seconds())
        return box[0] if box else None

    def reporting_rank(self, *, claim: bool) -> int | None:
        """The rank that reports the run's end: the first that claimed it. None: no rank has, or no store.

        claim: become that rank if there is none yet.
        """
        box: list[bytes] = []

        def ask() -> None:
            try:
                box.append(self._store.compare_set(_key("reporting rank"), "", str(self.rank) if claim else ""))
            except RuntimeError:
                return

        thread = threading.Thread(target=ask, name="asking for the reporting rank", daemon=True)
        thread.start()
        thread.join(STORE_TIMEOUT.total_seconds())
        return int(box[0]) if box and box[0] else None

    @property
    def look_seconds(self) -> float:
        """Seconds of silence after which a rank counts as lost."""
        return 3 * self.interval + 0.5

    def _look(self) -> Seen:
        first = {rank: self._read(rank) for rank in range(self.world)}
        reports, silent = dict(first), set(first)
        deadline = time.monotonic() + self.look_seconds
        while silent and time.monotonic() < deadline:
            time.sleep(self.interval / 2)
            for rank in list(silent):
                reports[rank] = self._read(rank)
                if reports[rank] is not None and reports[rank] != first[rank]:
                    silent.discard(rank)
            if all(self._has_ended(reports[rank]) for rank in silent):
                break
        return {rank: (reports[rank], rank not in silent) for rank in first}

    def _read(self, rank: int) -> dict[str, Any] | None:
        key = _key(rank)
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _has_ended(self, report: dict[str, Any] | None) -> bool:
        """Whether the rank's process is known to have ended: it ran in this PID namespace, and does not exist."""
        if report is None or any(report[name] != self._identity[name] for name in ("host", "namespace")):
            return False
        try:
            return Path(f"/proc/{report['pid']}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except FileNotFoundError:
            return True
        except (OSError, IndexError):
            return False


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"unknown to process {os.getpid()}"


def _key(of: int | str) -> str:
    return f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{of}"


def _connect() -> dist.TCPStore:
    """A new connection: a waiting call may block that of the process group."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         wait_for_workers=False, timeout=STORE_TIMEOUT)
