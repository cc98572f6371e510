"""Signals that end the run: recorded when received, handled by all ranks together at a step boundary.

SIGTERM, SIGUSR1, SIGHUP and the first SIGINT (Ctrl-C) save a checkpoint and end with code 75; the same command resumes.
A second SIGINT ends the process at once, with nothing saved; shells show that as 130.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# nohup ignores SIGHUP; a shell without job control starts background jobs with SIGINT ignored
LEFT_IGNORED = (signal.SIGHUP, signal.SIGINT)
CTRL_C = b"SIGINT: saving at the end of this step and ending; Ctrl-C once more ends at once, with nothing saved\n"


class StopSignal:
    """`seen`: the number of the first signal received. prints: whether this process answers Ctrl-C with a line."""

    def __init__(self, prints: bool = True) -> None:
        self.seen: int | None = None
        self._prints = prints
        self._before = {number: signal.signal(number, self._note) for number in WATCHED
                        if number not in LEFT_IGNORED or signal.getsignal(number) is not signal.SIG_IGN}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = self.seen or number
        if number != signal.SIGINT:
            return
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one must work while a collective blocks Python
        if self._prints:
            with contextlib.suppress(OSError):
                os.write(2, CTRL_C)  # not print, which may have been interrupted

    @staticmethod
    def name(number: int) -> str | None:
        return signal.Signals(number).name if number else None

    def restore(self) -> None:
        """Restore the earlier handlers; after a signal, ignore further ones until the process has reported its end."""
        for number, handler in self._before.items():
            after = signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN
            signal.signal(number, after if self.seen else handler)
