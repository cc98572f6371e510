"""How far a preparation is: a bar in a terminal, else a line every 30 seconds on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NamedTuple, TextIO

from tqdm import tqdm

EVERY_SECONDS = 30.0


class Counts(NamedTuple):
    """What has been done so far, or within a part.

    Attributes:
        read: bytes of the input files.
        text: UTF-8 bytes of documents.
        tokens: packed.
    """

    read: int = 0
    text: int = 0
    tokens: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*map(int.__add__, self, other))


class ProgressReport:
    """Shows `Counts` as they grow.

    Args:
        total: bytes of all input files.
        stream: stderr.
        clock: seconds, monotonic.
    """

    def __init__(self, total: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._total, self._stream, self._clock = total, stream or sys.stderr, clock
        self._first: Counts | None = None
        self._began = self._said = clock()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, file=self._stream) if self._stream.isatty() else None

    def update(self, now: Counts) -> None:
        """Show `now`, if it is time to."""
        if self._first is None:
            self._first = now
        if self._bar is not None:
            self._bar.set_postfix_str(f"{now.tokens:,} tokens, {self._speed(now):.1f} MB/s of text", refresh=False)
            self._bar.update(now.read - self._bar.n)
        elif self._clock() - self._said >= EVERY_SECONDS:
            self._said = self._clock()
            print(f"prepare | {self.line(now)}", file=self._stream, flush=True)

    def line(self, now: Counts) -> str:
        """`12.3% | 1,234,567 tokens | 5.2 MB/s | eta 1h02m`: MB are 10^6 bytes of text."""
        share = min(now.read / self._total, 1) if self._total else 1.0
        return (f"{100 * share:.1f}% | {now.tokens:,} tokens | {self._speed(now):.1f} MB/s | "
                f"eta {_duration(self._left_seconds(now))}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _speed(self, now: Counts) -> float:
        return (now.text - self._first.text) / 1e6 / max(self._clock() - self._began, 1e-9)

    def _left_seconds(self, now: Counts) -> float | None:
        done = now.read - self._first.read
        return (self._clock() - self._began) * max(self._total - now.read, 0) / done if done > 0 else None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
