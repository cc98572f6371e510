"""Writing a checkpoint while training goes on.

Each rank hands over a copy of what it owns and trains on; its thread writes the files and,
last, a report `rank-NNNNN.json`. Rank 0's thread waits for all reports, writes the manifest
and gives the folder its name. Ranks meet only in the folder, so no collective runs beside
those of the training step. A kill at any moment leaves a `.tmp` folder that counts for nothing.
Writing, syncing and hashing all release Python's interpreter lock.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hola_megatron.checkpoint.folder import file_digest, finish_writing, sync_file, write_durably
from hola_megatron.errors import CheckpointError

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Held:
    """What one rank writes: {file: {key: CPU tensor}}, and where each belongs in the logical tensors."""

    files: dict[str, dict[str, Tensor]]
    index: dict[str, Any]
    finite: bool = True

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors.values())


def write_rank(held: Held, rank: int, folder: Path) -> None:
    """Write one rank's files and then its report; OSError if the disk refuses."""
    files = {}
    for name, tensors in held.files.items():
        if tensors:
            save_file(tensors, folder / name)
            sync_file(folder / name)
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
    write_durably(folder / f"rank-{rank:05d}.json",
                  json.dumps({"files": files, "index": held.index, "finite": held.finite}).encode())


def put_together(folder: Path, ranks: int, manifest: dict[str, Any], keep_waiting: Callable[[], bool]) -> Path | None:
    """Wait for every rank's report, write the manifest, name the folder; None if told not to wait any longer."""
    names = [folder / f"rank-{rank:05d}.json" for rank in range(ranks)]
    reports: dict[Path, Any] = {}
    while len(reports) < ranks:
        for name in names:
            if name not in reports and (report := _read(name)) is not None:
                reports[name] = report
        if len(reports) < ranks:
            if not keep_waiting():
                return None
            time.sleep(POLL_SECONDS)
    for name in names:
        name.unlink()
    healthy = manifest.get("healthy", True) and all(report["finite"] for report in reports.values())
    return finish_writing(folder, {**manifest, **merge([reports[name] for name in names]), "healthy": healthy})


def merge(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's "files" and "tensors" from all ranks' reports."""
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for report in reports:
        files |= report["files"]
        for kind, entries in report["index"].items():
            for name, entry in entries.items():
                known = tensors.setdefault(kind, {}).setdefault(name, {"shape": entry["shape"], "shards": []})
                known["shards"] += entry["shards"]
    return {"files": files, "tensors": tensors}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # not there yet, or not all of it
        return None


def refusal(root: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{root}: the checkpoint could not be written ({why}); earlier ones are untouched, "
                           "free the disk or mend the folder and start the run again")


def _clear_up(actions: Sequence[Callable[[], object]]) -> None:
    """The checkpoint is whole; what fails now is told and costs nothing else."""
    for action in actions:
        try:
            action()
        except Exception as error:
            print(f"after saving | {action.__name__}: {error}", file=sys.stderr, flush=True)


class BackgroundWriter:
    """One checkpoint at a time, on one rank. After `start`, look at `busy`; `take_result` once it is false."""

    def __init__(self, rank: int, ranks: int):
        self.rank, self.ranks = rank, ranks
        self._thread: threading.Thread | None = None
        self._give_up = threading.Event()
        self._path: Path | None = None
        self._error: CheckpointError | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def start(self, held: Held, folder: Path, manifest: dict[str, Any],
              afterwards: Sequence[Callable[[], object]] = ()) -> None:
        """Begin writing `held` to `folder`; rank 0 also finishes it and then calls each of `afterwards`."""
        assert not self.busy, "one checkpoint at a time"
        self._path = self._error = None

        def work() -> None:
            try:
                write_rank(held, self.rank, folder)
                if self.rank == 0:
                    self._path = put_together(folder, self.ranks, manifest, lambda: not self._give_up.is_set())
                    _clear_up(afterwards if self._path else ())
            except Exception as error:  # a thread must not die unseen (safetensors has its own kind for a full disk)
                self._error = refusal(folder.parent, error)

        self._thread = threading.Thread(target=work, name="checkpoint writer", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """At most so long, until this rank's part is written (rank 0: until the checkpoint is whole)."""
        if self._thread is not None:
            self._thread.join(seconds)

    def take_result(self) -> Path | None:
        """The finished checkpoint, once (rank 0 only); CheckpointError if it could not be written."""
        self._thread = None
        path, error, self._path, self._error = self._path, self._error, None, None
        if error:
            raise error
        return path

    def abandon(self, seconds: float) -> None:
        """The run is ending in an error: let a writing that can finish do so, do not wait for ranks that are gone."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._give_up.set()
            self._thread.join(1)
