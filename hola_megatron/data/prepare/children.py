"""Worker processes that end with their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import connection
from typing import Any


def spawning() -> Any:
    """How worker processes are started: forking one that holds a tokenizer's threads can deadlock."""
    return multiprocessing.get_context("spawn")


def end_with_parent() -> None:
    """From now on this worker process ends when its parent does: also after SIGKILL, which runs no handler there.

    A worker that waits for work would else wait for ever: its queue is open in the other workers as well.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end with the parent", daemon=True).start()
