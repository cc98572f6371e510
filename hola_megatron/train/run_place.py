"""Detects, at the next save, that the run folder was moved or removed during the run.

Otherwise the folder would be created again under its old name, with only the later half of the run.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hola_megatron.errors import RunFolderError


class RunPlace:
    """The folder that a run was started in, also after it was renamed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._handle = os.open(folder, os.O_RDONLY)
        self._identity = _identity(folder)

    def moved_to(self) -> Path | None:
        """The folder's new path, None if it was not moved. Raises RunFolderError if it cannot be found."""
        if _identity(self.folder) == self._identity:
            return None
        with contextlib.suppress(OSError):
            now = Path(os.readlink(f"/proc/self/fd/{self._handle}"))
            if _identity(now) == self._identity:
                return now
        raise RunFolderError(f"{self.folder}: the run folder is not there any more, moved or removed while the "
                             "run went on; put it back, and start the same command again")

    def close(self) -> None:
        os.close(self._handle)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        about = os.stat(folder)
    except OSError:
        return None
    return about.st_dev, about.st_ino
