"""The checkpoint folder on disk: writing, verification, search, retention.

    runs/NAME/checkpoints/step_00000100/
        weights-00000.safetensors   optimizer-00000.safetensors   ... one pair per writing rank
        manifest.json               written last: files with sizes and sha256, shards of every
                                    logical tensor, the trainer's state, and a sha256 of itself
A checkpoint is written under a temporary name, fsynced and renamed, so a folder without `.tmp` is complete unless the
disk damaged it. There is no "latest" file: the newest folder that verifies is used, and every one passed over is
printed. One that the system refuses to read is not passed over: it ends the program (reading.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hola_megatron.checkpoint.reading import MISSING, PAUSES, CheckpointUnreadable, read_with_retries
from hola_megatron.errors import CheckpointError
from hola_megatron.files import (
    DamagedFile,
    FileProblem,
    MissingFile,
    check_schema,
    parse_json,
    read_bytes,
    read_json,
    schemas,
    shown,
)

MANIFEST = "manifest.json"
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
FORMAT = 2
HASHING_THREADS = 8
_NAME = re.compile(r"^step_(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and its manifest as read."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def healthy(self) -> bool:
        """False if it was saved during bad steps, or has a value that is not finite."""
        return self.manifest.get("healthy", True)

    def run_manifest(self) -> dict[str, Any]:
        """The manifest, with all entries that a run or an export needs. Raises CheckpointError for a missing one."""
        try:
            check_schema(self.manifest, schemas.RUN_MANIFEST)
        except DamagedFile as problem:
            raise CheckpointError(f"{self.path / MANIFEST}: {problem}; use another checkpoint") from None
        return self.manifest


def folder_name(step: int) -> str:
    """The name of a checkpoint's folder: step_00000100."""
    return f"step_{step:08d}"


def list_steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all folders with a checkpoint's name, newest first. Raises CheckpointUnreadable."""
    def find() -> list[tuple[int, Path]]:
        if not root.is_dir():
            return []
        return [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.match(path.name)) and path.is_dir()]

    return sorted(read_with_retries(root, find), reverse=True)


def open_checkpoint(path: Path, *, verify: bool = True, pauses: Sequence[float] = PAUSES) -> Checkpoint:
    """Read and check one checkpoint.

    Args:
        path: its folder.
        verify: hash the files.
        pauses: seconds before each new attempt where the system refuses to read.

    Raises:
        CheckpointError: a file is missing or damaged.
        CheckpointUnreadable: the system refuses to read a file, also in the last attempt.
    """
    try:
        text = read_with_retries(path / MANIFEST, lambda: read_bytes(path / MANIFEST), pauses)
        manifest = parse_json(text, schemas.MAPPING)
    except MissingFile:
        raise CheckpointError(f"{path}: not a checkpoint (no {MANIFEST}); give a step_NNNNNNNN folder") from None
    except DamagedFile as problem:
        raise CheckpointError(f"{path / MANIFEST}: {problem}; use another checkpoint") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: format {shown(manifest.get('format'))}; this version reads {FORMAT}")
    if manifest.get("sha256") != _seal(manifest):
        raise CheckpointError(f"{path / MANIFEST}: damaged (its sha256 is not that of its content); "
                              "use another checkpoint")
    try:
        check_schema(manifest, schemas.MANIFEST)
    except DamagedFile as problem:
        raise CheckpointError(f"{path / MANIFEST}: {problem}; the manifest was altered, use another checkpoint"
                              ) from None
    if _NAME.match(path.name) and path.name != folder_name(manifest["step"]):
        raise CheckpointError(f"{path}: holds step {manifest['step']:,}, so it is a copy under another name; rename it "
                              f"{folder_name(manifest['step'])}, or move it out of this folder")
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing releases the interpreter lock
        list(pool.map(lambda item: _check_file(path, *item, verify, pauses), manifest["files"].items()))
    return Checkpoint(path, manifest)


def is_misnamed_copy(path: Path) -> bool:
    """Whether the folder has a checkpoint of another step than its name: a user's copy, which must not be removed."""
    try:
        manifest = read_json(path / MANIFEST, schemas.MANIFEST)
    except FileProblem:
        return False
    return path.name != folder_name(manifest["step"])


def _seal(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest's content without its own "sha256"."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_file(path: Path, name: str, about: dict[str, Any], verify: bool, pauses: Sequence[float]) -> None:
    file = path / name
    try:
        size = read_with_retries(file, lambda: file.stat().st_size, pauses)
        if size != about["bytes"]:
            raise CheckpointError(f"{file}: damaged ({size} bytes, {about['bytes']} written); use another checkpoint")
        if verify and (found := read_with_retries(file, lambda: file_digest(file), pauses)) != about["sha256"]:
            raise CheckpointError(f"{file}: damaged (sha256 {found[:12]}, {about['sha256'][:12]} written); "
                                  "use another checkpoint")
    except MISSING:
        raise CheckpointError(f"{file}: missing; use another checkpoint") from None


def newest_usable(root: Path, *, healthy: bool = False,
                  before: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and the problem of each newer one.

    Args:
        root: the folder of step_NNNNNNNN folders.
        healthy: pass over those that were saved during bad steps.
        before: only steps below this one; None: any.

    Raises:
        CheckpointUnreadable: the system refuses to read one that may be complete.
    """
    passed_over = []
    for step, path in list_steps(root):
        if before is not None and step >= before:
            continue
        try:
            # hashing may take minutes: skip it for a checkpoint that is passed over
            if healthy and not open_checkpoint(path, verify=False).healthy:
                passed_over.append(f"{path}: saved during bad steps")
                continue
            return open_checkpoint(path), passed_over
        except CheckpointUnreadable:
            raise
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def find_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint from its own folder, or the newest of a run folder (or its checkpoints folder).

    Raises CheckpointError also where a newer one is damaged: the user must choose then.
    """
    path = Path(path)
    if _NAME.match(path.name) or read_with_retries(path, (path / MANIFEST).exists):
        return open_checkpoint(path)
    root = path / "checkpoints" if read_with_retries(path, (path / "checkpoints").is_dir) else path
    found, passed_over = newest_usable(root)
    if found is None:
        why = f"; {' | '.join(passed_over)}" if passed_over else ""
        raise CheckpointError(f"{path}: no checkpoint here (looked for step_NNNNNNNN folders){why}; "
                              "give a run folder or one checkpoint's folder")
    if passed_over:
        raise CheckpointError(f"{' | '.join(passed_over)}; the newest usable checkpoint is {found.path}: give that "
                              "folder if it is the one you want")
    return found


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start_writing(root: Path, step: int) -> Path:
    """Create the temporary folder of a new checkpoint, on one rank; leftovers of killed saves are removed first."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob("*.tmp"):
        shutil.rmtree(left)
    path = root / f"{folder_name(step)}.tmp"
    path.mkdir()
    return path


def finish_writing(temporary: Path, manifest: dict[str, Any]) -> Path:
    """Write the sealed manifest, fsync, and rename the folder to its final name, which is returned."""
    sealed = json.loads(json.dumps(manifest))  # the values as they will be read
    sealed["sha256"] = _seal(sealed)
    write_durably(temporary / MANIFEST, json.dumps(sealed, indent=1, sort_keys=True).encode())
    sync_folder(temporary)
    final = temporary.with_name(temporary.name.removesuffix(".tmp"))
    before = temporary.with_name(f"{final.name}.before.tmp")
    if final.exists() and is_misnamed_copy(final):
        os.rename(final, _unused(final.with_name(f"{final.name}.copy")))
    if final.exists():  # of the same step: damaged, or from before a rewind
        os.rename(final, before)
    os.rename(temporary, final)
    sync_folder(final.parent)
    if before.exists():
        shutil.rmtree(before)
    return final


def _unused(path: Path) -> Path:
    number = 1
    while (found := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return found


def write_durably(path: Path, data: bytes) -> None:
    """Write and fsync a file. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        _sync(file.fileno())


def sync_file(path: Path) -> None:
    """fsync a file, where the file system can. Raises OSError."""
    with path.open("rb") as file:
        _sync(file.fileno())


def sync_folder(path: Path) -> None:
    """fsync a folder, where the file system can. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        _sync(handle)
    finally:
        os.close(handle)


def _sync(handle: int) -> None:
    """fsync, where the file system has it: some (FUSE) do not, mostly for folders (`cannot_sync` at the start)."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def cannot_sync(folder: Path) -> str | None:
    """The file system's message where it cannot sync this folder; None where it can. Raises OSError for others."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        return error.strerror
    finally:
        os.close(handle)
    return None


def prune(root: Path, keep: int, keep_every: int | None, *, dry_run: bool = False,
          spare: Path | None = None) -> list[Path]:
    """Remove all but the newest `keep` healthy checkpoints and the multiples of `keep_every`; returns those removed.

    Only complete and healthy checkpoints are counted, so the last healthy one is never removed. Unhealthy ones stay
    until `keep` healthy ones are newer. dry_run: remove nothing. spare: one that is being read and stays for now.
    """
    removed, healthy = [], 0
    for step, path in list_steps(root):
        old = healthy >= keep and (keep_every is None or step % keep_every)
        if old and path != spare and not is_misnamed_copy(path):
            if not dry_run:
                remove(path)
            removed.append(path)
        healthy += _is_healthy(path)
    return removed


def remove(path: Path) -> None:
    """Remove a checkpoint, the manifest first: a partly removed folder must not look complete."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def _is_healthy(path: Path) -> bool:
    """Whether its manifest is marked healthy and its files have their full size (without hashing, for speed)."""
    try:
        return open_checkpoint(path, verify=False, pauses=()).healthy
    except CheckpointError:
        return False
