"""Non-blocking standard streams: printing can neither end nor delay a run.

An output error (EPIPE, ENOSPC, EIO of a closed terminal) is reported once on the other stream, and the stream is then
not used any more. For a reader that does not read (a stopped `tee`, a paused terminal) lines wait in a queue, and are
dropped when it is full. A character that the stream's encoding lacks is written as an escape.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

LINES = 10_000
DRAIN_SECONDS = 5.0


class SteadyStream(io.TextIOBase):
    """Replacement of sys.stdout or sys.stderr: `write` returns at once, a thread writes.

    waits: whether `flush` waits for the thread, while that makes progress.
    """

    def __init__(self, stream: Any, name: str, *, waits: bool):
        self._stream, self._name, self._waits = stream, name, waits
        self._queue: queue.Queue[str | None] = queue.Queue(LINES)
        self._dropped, self._broken, self._line = 0, False, ""
        self._lock = threading.Lock()
        try:
            self._number: int | None = stream.fileno()
        except (OSError, ValueError, AttributeError):  # a test's or a notebook's stream
            self._number = None
        self._thread = threading.Thread(target=self._write_all, name=f"{name} writer", daemon=True)
        self._thread.start()

    @property
    def encoding(self) -> str:
        return self._stream.encoding or "utf-8"

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            self._line += text
            whole, newline, self._line = self._line.rpartition("\n")
            if newline:
                self._put(whole + newline)
        return len(text)

    def flush(self) -> None:
        with self._lock:
            if self._line:
                self._put(self._line)
                self._line = ""
        if self._waits:
            self._waits = self.drain(2.0)

    def drain(self, seconds: float) -> bool:
        """Wait up to `seconds` until everything is written; returns whether it was."""
        end = time.monotonic() + seconds
        while self._queue.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)
        return not self._queue.unfinished_tasks

    def finish(self) -> None:
        """Write the rest of the queue, and end the thread."""
        self.flush()
        self.drain(DRAIN_SECONDS)
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def _put(self, text: str) -> None:
        try:
            self._queue.put_nowait(text)
        except queue.Full:
            self._dropped += 1

    def _write_all(self) -> None:
        while (text := self._queue.get()) is not None:
            try:
                if self._dropped:
                    text = f"({self._dropped} lines were left out: nobody read {self._name})\n{text}"
                    self._dropped = 0
                if not self._broken:
                    self._write_now(text)
            except (OSError, ValueError) as error:
                self._give_up(error)
            finally:
                self._queue.task_done()

    def _write_now(self, text: str) -> None:
        data = text.encode(self.encoding, errors="backslashreplace")
        if self._number is None:
            self._stream.write(data.decode(self.encoding))
            self._stream.flush()
            return
        while data:
            try:
                data = data[os.write(self._number, data):]
            except BlockingIOError:
                select.select([], [self._number], [], 1.0)

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        if self._number is not None:
            silence(self._number)
        other = sys.stderr if self._name == "stdout" else sys.stdout
        with contextlib.suppress(OSError, ValueError):
            print(f"report | {self._name} cannot be written ({error}); left alone from here on, the run goes on",
                  file=other, flush=True)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Replace sys.stdout and sys.stderr by `SteadyStream` inside the context."""
    before = sys.stdout, sys.stderr
    for stream in before:
        try:
            stream.flush()
        except OSError:
            silence(stream.fileno())
    sys.stdout = SteadyStream(before[0], "stdout", waits=False)
    sys.stderr = SteadyStream(before[1], "stderr", waits=True)
    try:
        yield
    finally:
        sys.stdout.finish()
        sys.stderr.finish()
        sys.stdout, sys.stderr = before


def silence(number: int) -> None:
    """Redirect a descriptor to /dev/null: with unwritten output at exit, Python would end with code 120."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
