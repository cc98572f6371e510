"""Ends the run when a rank hangs or dies, and names the rank.

Every rank reports to the job's store, from a thread, that it is alive and where its main thread is. A rank whose main
thread has made no progress for `parallel.hang_seconds` compares the reports of all ranks, names the rank at fault,
writes stacks to the run folder and ends with code 76; the launcher then ends the others.

Time is counted in the watchdog's ticks: a process that was suspended (SIGSTOP, `scontrol suspend`, a closed laptop) has
none meanwhile, so it does not end when it is continued.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hola_megatron.control.blame import blame, named
from hola_megatron.control.heartbeat import Heartbeat, Seen
from hola_megatron.control.launcher_watch import LAUNCHER, leave
from hola_megatron.control.lost import in_short
from hola_megatron.errors import EXIT_LOST, LostError
from hola_megatron.parallel.groups import Layout
from hola_megatron.parallel.waiting import main_thread_waits

STORE_GONE = "the job's store cannot be reached: the machine of rank 0 or its launcher died"


class Watchdog:
    """`mark` progress from the main thread; `lost_peer` explains a collective that failed.

    It watches between `start` and `stop`: without a `stop` it ends the process even if the run has failed meanwhile.
    """

    def __init__(self, layout: Layout, folder: Path, limit_seconds: float | None, newest: int | None = None):
        self.command = "the same command"  # the command that resumes the run
        self.rank, self.world, self.folder, self.limit = layout.rank, layout.world, folder, limit_seconds
        self.newest = newest  # step of the newest whole checkpoint
        self.interval = min(max((limit_seconds or 50) / 10, 0.2), 1.0)
        self._main = threading.main_thread().ident
        self._ticks = 0
        self._mark: tuple[int, str, float, float | None] = (0, "start", 0.0, limit_seconds)
        self._stop = threading.Event()
        self._heartbeat: Heartbeat | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watch this rank, and report it to the others."""
        if self.world > 1:
            self._heartbeat = Heartbeat(self.rank, self.world, self.interval, self._report, self._store_is_lost)
        self._thread.start()

    def mark(self, step: int, phase: str, *, patient: bool = False, limit: float | None = None) -> None:
        """Report that the main thread starts `phase` ("step", "valid", "save", ...) after `step` finished steps.

        patient: the phase may exceed the limit; only `parallel.timeout_minutes` ends it.
        limit: of this phase in seconds, if less than the usual limit or there is none.
        """
        limits = [seconds for seconds in (self.limit, limit) if seconds is not None]
        self._mark = (step, phase, math.inf if patient else self.awake(), min(limits, default=None))

    def awake(self) -> float:
        """Seconds that this process has run since the start, without those in which it was suspended."""
        return self._ticks * self.interval

    def stop(self) -> None:
        self._stop.set()
        if self._heartbeat:
            self._heartbeat.stop()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * self.interval)

    def resume_advice(self) -> str:
        """The last clause of a message about a lost run: how to resume it."""
        root = self.folder / "checkpoints"
        if self.newest is None:
            return f"{root} has no checkpoint yet; start the same command again to start from step 0"
        return f"start {self.command} again to go on from {root / f'step_{self.newest:08d}'}"

    def lost_peer(self, error: RuntimeError) -> LostError:
        """The LostError for a collective that raised `error`; it names the ranks that no longer report, if any."""
        seen: Seen | None = {}
        if self.world > 1:  # without a heartbeat the store was lost at the start
            seen = self._heartbeat.compare() if self._heartbeat else None
        after = f"after step {self._mark[0]:,}"
        if seen is None:
            return LostError(f"{self.folder}: {STORE_GONE} {after}; {self.resume_advice()}")
        silent = [rank for rank, (_, alive) in seen.items() if not alive]
        reporting = self._heartbeat.reporting_rank(claim=False) if self._heartbeat else None
        if reporting not in (self.rank, None):
            return LostError(f"{self.folder}: rank {reporting} ended the run {after} and says why; "
                             f"{self.resume_advice()}")
        if not silent:
            return LostError(f"{self.folder}: the ranks lost their connections {after} ({in_short(error)}), although "
                             f"all of them live; {self.resume_advice()}")
        return LostError(f"{self.folder}: {named(silent)} {'has' if len(silent) == 1 else 'have'} died (not heard of "
                         f"any more) {after}; the log of {'it' if len(silent) == 1 else 'each'} says why, if it could; "
                         f"{self.resume_advice()}")

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._ticks += 1
            if self._heartbeat:
                self._heartbeat.tick()
            _, _, since, limit = self._mark
            if limit is not None and self.awake() - since > limit:
                self._end(limit)

    def _report(self) -> dict[str, Any]:
        """This rank's values for the heartbeat."""
        frame = sys._current_frames().get(self._main)
        where = "nowhere"
        if frame is not None:
            where = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        return {"step": self._mark[0], "phase": self._mark[1], "where": where, "waits": main_thread_waits()}

    def _store_is_lost(self) -> None:
        if not self._stop.is_set():
            LAUNCHER.notice(STORE_GONE)

    def _end(self, limit: float) -> None:
        """Name the rank at fault and end; of the live ranks, the first reports for all."""
        seen = self._heartbeat.compare() if self._heartbeat else {self.rank: (self._report(), True)}
        # in a thread: a disk that does not answer would block for ever
        stacks = threading.Thread(target=self._dump_stacks, daemon=True)
        stacks.start()
        stacks.join(3)
        first = self.rank if seen is None else min(
            (rank for rank, (_, alive) in seen.items() if alive), default=self.rank)
        # after the reporting rank has ended, another one is the first live rank: the claim in the store decides
        if self.rank == first and (not self._heartbeat
                                   or self._heartbeat.reporting_rank(claim=True) in (self.rank, None)):
            leave(self._why(seen, limit))
        time.sleep(2 * self.interval)  # the launcher ends all ranks when one ends: let the reporting rank print first
        os._exit(EXIT_LOST)

    def _why(self, seen: Seen | None, limit: float) -> str:
        why = STORE_GONE if seen is None else blame(seen)
        return f"{self.folder}: no progress for {limit:.0f} s after step {self._mark[0]:,}: {why}; stacks are in " \
               f"{self.folder / 'hang'}; {self.resume_advice()}"

    def _dump_stacks(self) -> None:
        try:
            (self.folder / "hang").mkdir(exist_ok=True)
            with (self.folder / "hang" / f"rank-{self.rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError:
            pass
