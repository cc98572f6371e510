"""Writing of a checkpoint in the background.

Each rank passes a host copy of its tensors to its writer thread and continues to train. The thread writes the files
and, last, a report `rank-NNNNN.json`. Rank 0's thread waits for all reports, writes the manifest and renames the
folder. Threads communicate only through the folder, so no collective runs concurrently with the training step's. A kill
at any moment leaves a `.tmp` folder, which is ignored. Writing, syncing and hashing release the interpreter lock.
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
from hola_megatron.files import FileProblem, read_json, schemas

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class HostSnapshot:
    """What one rank writes.

    files: {file: {key: CPU tensor}}. index: {kind: {logical tensor: shape and shards}}, as in the manifest. nonfinite:
    names of the tensors with a value that is not finite ("exp_avg_sq of model.norm.weight").
    """

    files: dict[str, dict[str, Tensor]]
    index: dict[str, Any]
    nonfinite: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors.values())


def write_rank(snapshot: HostSnapshot, rank: int, folder: Path) -> None:
    """Write one rank's files and then its report. Raises OSError."""
    files = {}
    for name, tensors in snapshot.files.items():
        if tensors:
            save_file(tensors, folder / name)
            sync_file(folder / name)
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
    write_durably(folder / f"rank-{rank:05d}.json",
                  json.dumps({"files": files, "index": snapshot.index, "finite": not snapshot.nonfinite}).encode())


def assemble(folder: Path, ranks: int, manifest: dict[str, Any], keep_waiting: Callable[[], bool],
                 note: Callable[[str], None] = lambda doing: None) -> Path | None:
    """Wait for every rank's report, write the manifest and rename the folder, which is returned.

    keep_waiting: called between reads; None is returned when it is false. note: called with a description of the wait.
    """
    names = [folder / f"rank-{rank:05d}.json" for rank in range(ranks)]
    reports: dict[Path, Any] = {}
    while len(reports) < ranks:
        for name in names:
            if name not in reports and (report := _read(name)) is not None:
                reports[name] = report
        if len(reports) < ranks:
            missing = [str(rank) for rank, name in enumerate(names) if name not in reports]
            note(f"no report of rank {', '.join(missing[:8])}{' and others' if len(missing) > 8 else ''} in {folder}")
            if not keep_waiting():
                return None
            time.sleep(POLL_SECONDS)
    note(f"the manifest of {folder} is being written")
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
        return read_json(path, schemas.RANK_REPORT)
    except FileProblem:  # not written yet, or partly
        return None


def refusal(root: Path, why: object) -> CheckpointError:
    """The error for a checkpoint under `root` that could not be written; why: the reason."""
    return CheckpointError(f"{root}: the checkpoint could not be written ({why}); earlier ones are untouched, "
                           "free the disk or mend the folder and start the run again")


def _clear_up(actions: Sequence[Callable[[], object]]) -> None:
    """Run the actions after a complete checkpoint; an error is printed and has no other effect."""
    for action in actions:
        try:
            action()
        except Exception as error:
            print(f"after saving | {action.__name__}: {error}", file=sys.stderr, flush=True)


class BackgroundWriter:
    """Writes one checkpoint at a time, on one rank. After `start`, poll `busy`; then call `take_result`."""

    def __init__(self, rank: int, ranks: int):
        self.rank, self.ranks = rank, ranks
        self._thread: threading.Thread | None = None
        self._give_up = threading.Event()
        self._path: Path | None = None
        self._error: CheckpointError | None = None
        self.folder: Path | None = None  # of the current or last checkpoint
        self.doing = ""  # current action of the thread, for messages about a slow one

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def start(self, snapshot: HostSnapshot, folder: Path, manifest: dict[str, Any],
              afterwards: Sequence[Callable[[], object]] = ()) -> None:
        """Start to write `snapshot` to `folder`; rank 0 also assembles it and then calls each of `afterwards`."""
        assert not self.busy, "one checkpoint at a time"
        self._path = self._error = None
        self.folder = folder
        self._note(f"rank {self.rank} writes its files in {folder}")

        def work() -> None:
            try:
                write_rank(snapshot, self.rank, folder)
                if self.rank == 0:
                    self._path = assemble(folder, self.ranks, manifest, lambda: not self._give_up.is_set(),
                                              self._note)
                    self._note(f"{folder.parent}: older checkpoints are being removed")
                    _clear_up(afterwards if self._path else ())
            except Exception as error:  # any: safetensors has an error type of its own for a full disk
                self._error = refusal(folder.parent, error)

        self._thread = threading.Thread(target=work, name="checkpoint writer", daemon=True)
        self._thread.start()

    def _note(self, doing: str) -> None:
        self.doing = doing

    def wait(self, seconds: float) -> None:
        """Wait up to `seconds` until this rank's files are written (rank 0: until the checkpoint is complete)."""
        if self._thread is not None:
            self._thread.join(seconds)

    def take_result(self) -> Path | None:
        """The finished checkpoint, once (rank 0 only). Raises CheckpointError if it could not be written."""
        self._thread = None
        path, error, self._path, self._error = self._path, self._error, None, None
        if error:
            raise error
        return path

    def abandon(self, seconds: float) -> None:
        """After an error of the run: wait up to `seconds` for the writer, then stop waiting for other ranks."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._give_up.set()
            self._thread.join(1)
