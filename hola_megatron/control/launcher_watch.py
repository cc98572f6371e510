"""Ends the ranks when their launcher has ended.

A launcher that is killed (out of memory, kill -9) leaves its ranks to another parent process. Under torchrun, or our
launcher, a rank checks its parent once per second. Other nodes notice that the job's store is lost
(control/watchdog.py). A rank with nothing to save ends at once. In the training loop all ranks save at the next step
boundary if they can. After GRACE_SECONDS they end in any case, with code 76.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

from hola_megatron.errors import EXIT_LOST

GRACE_SECONDS = 35.0  # with the time to notice, less than a minute
LOOK_SECONDS = 1.0


class LauncherWatch:
    """One per process. lost: why the run must end; None while the launcher is alive."""

    def __init__(self) -> None:
        self.lost: str | None = None
        self.can_save = False  # set by the training loop, which checks `lost` at every step
        self._started = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Watch the parent process, if that is torchrun or our launcher. A shell may end without harm."""
        if self._started or "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        self._started = True
        threading.Thread(target=self._watch, args=(os.getppid(),), name="launcher watch", daemon=True).start()

    def notice(self, why: str) -> None:
        """Report that the launcher or its store is lost. Returns at once; the process ends within GRACE_SECONDS."""
        if self._is_first(why):
            threading.Thread(target=self._end, name="end without launcher", daemon=True).start()

    def _is_first(self, why: str) -> bool:
        with self._lock:
            first = self.lost is None
            if first:
                self.lost = why
        return first

    def _watch(self, parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        # in this thread: a process that is ending, as the other ranks have noticed first, starts no new ones
        if self._is_first(f"the launcher of this rank (process {parent}) died"):
            self._end()

    def _end(self) -> None:
        if self.can_save:
            time.sleep(GRACE_SECONDS)
            leave(f"{self.lost}, and the ranks could not save within {GRACE_SECONDS:g} s; start the same command again "
                  "to go on from the newest checkpoint")
        leave(f"{self.lost} before training began; nothing is lost, start the same command again")


LAUNCHER = LauncherWatch()


def leave(text: str) -> None:
    """Print `text` and end this process with code 76, independent of its main thread and of a blocked stderr."""
    printing = threading.Thread(target=_print, args=(f"LostError: {text}",), daemon=True)
    with contextlib.suppress(RuntimeError):  # no new threads while the interpreter ends
        printing.start()
        printing.join(2)  # stderr may be a pipe that nobody reads
    os._exit(EXIT_LOST)


def _print(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
        if hasattr(sys.stdout, "drain"):  # buffered lines of log/output.py
            sys.stdout.drain(1.0)
    except (OSError, ValueError):  # closed or full
        return
