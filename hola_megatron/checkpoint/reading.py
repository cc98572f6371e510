"""Reading of a checkpoint's files, with retries: a file that cannot be read now is not damaged.

A network file system may return EIO or ESTALE for seconds, and a wrong permission is no damage. Such a read is
repeated, and then ends the program: an older checkpoint is never used instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hola_megatron.errors import CheckpointError
from hola_megatron.files import one_line

PAUSES = (0.5, 1.0, 2.0)  # seconds before the second, third and fourth try
# these mean that a file is missing, which is damage
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class CheckpointUnreadable(CheckpointError):
    """The system refuses to read a checkpoint that may be complete."""


def read_with_retries[Result](path: Path, read: Callable[[], Result], pauses: Sequence[float] = PAUSES) -> Result:
    """The result of `read`, repeated after each of `pauses` (seconds) when the system refuses.

    Raises the error of `read` for a missing file; CheckpointUnreadable when the last attempt fails too.
    """
    for pause in (*pauses, None):
        try:
            return read()
        except MISSING:
            raise
        except OSError as error:
            if pause is None:
                raise CheckpointUnreadable(
                    f"{path}: cannot be read ({one_line(error)}), tried {len(pauses) + 1} times; it may be complete, "
                    "so no older checkpoint is used; mend the permissions or the file system, or move that "
                    "checkpoint's folder away to use an older one") from None
            print(f"reading again | {path}: {one_line(error)}", flush=True)
            time.sleep(pause)
    raise AssertionError("unreachable")
