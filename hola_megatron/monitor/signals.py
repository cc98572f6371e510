"""SIGTERM and SIGUSR1: noted when they come, acted on by all ranks together at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType

WATCHED = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers the number of a signal that came."""

    def __init__(self) -> None:
        self.seen: int | None = None
        self._before = {number: signal.signal(number, self._note) for number in WATCHED}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = number

    @staticmethod
    def name(number: int) -> str | None:
        return signal.Signals(number).name if number else None

    def restore(self) -> None:
        """As it was; but once a signal was seen, a repeated one must not end us before we have said so."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.seen else handler)
