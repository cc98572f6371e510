"""The checkpoint folder on disk: what is complete, what is damaged, what may go.

    runs/NAME/checkpoints/step_00000100/
        weights-00000.safetensors   optimizer-00000.safetensors   ... one pair a writing rank
        manifest.json               written last: files with sizes and sha256, where every
                                    logical tensor's shards are, the trainer's state, and a
                                    sha256 of itself
A checkpoint is written under a temporary name, fsynced and renamed, so a name without
`.tmp` is whole unless the disk damaged it. There is no "latest" file that could lie: the
newest folder that verifies wins, and every one passed over is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hola_megatron.errors import CheckpointError

MANIFEST = "manifest.json"
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
        """False when it was saved amid steps whose numbers were bad, or holds a value that is not finite."""
        return self.manifest.get("healthy", True)


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def list_steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that carries a checkpoint's name, newest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.match(path.name)) and path.is_dir()]
    return sorted(found, reverse=True)


def open_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Read and check one checkpoint; CheckpointError names the file that is missing or damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not a checkpoint (no {MANIFEST}); give a step_NNNNNNNN folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: damaged ({error}); use another checkpoint") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointError(f"{path / MANIFEST}: format {found!r}; this version reads {FORMAT}")
    if manifest.get("sha256") != _seal(manifest):
        raise CheckpointError(f"{path / MANIFEST}: damaged (its sha256 is not that of its content); "
                              "use another checkpoint")
    for tensors in manifest.get("tensors", {}).values():
        for entry in tensors.values():
            if not {shard["file"] for shard in entry["shards"]} <= manifest["files"].keys():
                raise CheckpointError(f"{path / MANIFEST}: names a shard file it does not list; "
                                      "the manifest was altered, use another checkpoint")
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing releases the interpreter lock
        list(pool.map(lambda item: _check_file(path, *item, verify), manifest["files"].items()))
    return Checkpoint(path, manifest)


def _seal(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest's content but for the seal itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_file(path: Path, name: str, about: dict[str, Any], verify: bool) -> None:
    if Path(name).name != name:
        raise CheckpointError(f"{path / MANIFEST}: names {name!r}, outside its folder; the manifest was altered")
    file = path / name
    try:
        size = file.stat().st_size
        if size != about["bytes"]:
            raise CheckpointError(f"{file}: damaged ({size} bytes, {about['bytes']} written); use another checkpoint")
        if verify and (found := file_digest(file)) != about["sha256"]:
            raise CheckpointError(f"{file}: damaged (sha256 {found[:12]}, {about['sha256'][:12]} written); "
                                  "use another checkpoint")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; use another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); use another checkpoint") from None


def newest_usable(root: Path, *, healthy: bool = False,
                  before: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies (if asked: that is healthy, of a step below `before`), and what was wrong
    with each newer one."""
    passed_over = []
    for step, path in list_steps(root):
        if before is not None and step >= before:
            continue
        try:
            # hashing may take minutes: not for one that is not wanted
            if healthy and not open_checkpoint(path, verify=False).healthy:
                passed_over.append(f"{path}: saved amid bad steps")
                continue
            return open_checkpoint(path), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def find_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint from its own folder, or the newest of a run folder (or its checkpoints folder)."""
    path = Path(path)
    if (path / MANIFEST).exists() or _NAME.match(path.name):
        return open_checkpoint(path)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found, passed_over = newest_usable(root)
    if found is None:
        why = f"; {' | '.join(passed_over)}" if passed_over else ""
        raise CheckpointError(f"{path}: no checkpoint here (looked for step_NNNNNNNN folders){why}; "
                              "give a run folder or one checkpoint's folder")
    return found


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start_writing(root: Path, step: int) -> Path:
    """The temporary folder of a new checkpoint; leftovers of killed saves are removed first. One rank calls it."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob("*.tmp"):
        shutil.rmtree(left)
    path = root / f"{folder_name(step)}.tmp"
    path.mkdir()
    return path


def finish_writing(temporary: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest last, make everything durable, and give the folder its name."""
    sealed = json.loads(json.dumps(manifest))  # as it will be read
    sealed["sha256"] = _seal(sealed)
    write_durably(temporary / MANIFEST, json.dumps(sealed, indent=1, sort_keys=True).encode())
    sync_folder(temporary)
    final = temporary.with_name(temporary.name.removesuffix(".tmp"))
    before = temporary.with_name(f"{final.name}.before.tmp")
    if final.exists():  # of the same step: damaged and passed over, or undone by a rewind
        os.rename(final, before)
    os.rename(temporary, final)
    sync_folder(final.parent)
    if before.exists():
        shutil.rmtree(before)
    return final


def write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def retire(root: Path, keep: int, keep_every: int | None) -> list[Path]:
    """Remove all but the newest `keep` healthy checkpoints and the multiples of `keep_every`; returns what went.

    Only whole and healthy checkpoints count as kept, so the last healthy one never goes. Newer unhealthy
    ones stay until enough healthy ones are newer than they.
    """
    gone, healthy = [], 0
    for step, path in list_steps(root):
        if healthy >= keep and (keep_every is None or step % keep_every):
            remove(path)
            gone.append(path)
        healthy += _is_healthy(path)
    return gone


def remove(path: Path) -> None:
    """Remove a checkpoint, the manifest first: a half-removed folder must not look whole."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def _is_healthy(path: Path) -> bool:
    """Whether it says so, and its files are there in full length. Hashes would take minutes at every save."""
    try:
        return open_checkpoint(path, verify=False).healthy
    except CheckpointError:
        return False
