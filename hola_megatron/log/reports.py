"""Reports (TensorBoard, Weights & Biases, plots) on a thread: they can neither end nor delay the run.

A kind of report that fails is printed once and not used any more.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

WAITING = 1000


class Reports:
    """Runs actions on a thread, in the order in which they were sent."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[str, Callable[[], object]] | None] = queue.Queue(WAITING)
        self._off: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
        self._thread.start()

    def send(self, kind: str, action: Callable[[], object]) -> None:
        """Queue an action; returns at once. With a full queue, this kind of report ends."""
        if kind in self._off:
            return
        try:
            self._queue.put_nowait((kind, action))
        except queue.Full:
            self.give_up(kind, f"{WAITING} reports wait")

    def attempt(self, kind: str, action: Callable[[], object]) -> bool:
        """Run an action on the caller's thread; returns whether it succeeded."""
        if kind in self._off:
            return False
        try:
            action()
        except Exception as error:  # any: packages have error types of their own
            self.give_up(kind, error)
            return False
        return True

    def give_up(self, kind: str, why: object) -> None:
        """Print the reason; later reports of this kind are dropped."""
        if kind not in self._off:
            self._off.add(kind)
            text = " ".join(str(why).split())[:300] or type(why).__name__
            print(f"report | {kind}: {text}; left alone from here on, the run goes on", flush=True)

    def close(self, seconds: float) -> None:
        """Wait up to `seconds` for the queued actions, and end the thread."""
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            print(f"report | not done within {seconds:g} s, not waited for", flush=True)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self.attempt(*item)
