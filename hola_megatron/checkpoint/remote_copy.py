"""Copies of checkpoints at a URL (s3://, gs://, ... whatever fsspec knows): upload in the background, and download.

A checkpoint's files are copied first and its manifest last, so a copy that has its manifest is whole. What could not be
copied is tried again with the next checkpoint, and after a restart. A copy that fails never ends the run.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hola_megatron.checkpoint.folder import (
    MANIFEST,
    Checkpoint,
    folder_name,
    is_misnamed_copy,
    list_steps,
    open_checkpoint,
)
from hola_megatron.data.urls import filesystem, is_url, storage_errors
from hola_megatron.errors import CheckpointError, DataError, RecipeError, one_line
from hola_megatron.files import DamagedFile, parse_json, schemas, shown

FILES_AT_ONCE = 8
_STEP = re.compile(r"^step_(\d{8,})$")


class Uploader:
    """Copies the complete checkpoints of `root` to `url`, on a thread of one rank.

    Args:
        root: the run's checkpoints folder.
        url: a folder of the run's own.
        say: called with a line about each copy, and each that failed.

    Raises:
        RecipeError: the URL cannot be written.
    """

    def __init__(self, root: Path, url: str, say: Callable[[str], None]):
        self.root, self.url, self._say = root, url.rstrip("/"), say
        self.copying: Path | None = None  # this folder must not be removed now
        self._wake, self._end, self._idle = threading.Event(), threading.Event(), threading.Event()
        self._idle.set()
        self._copied: dict[int, bytes] = {}  # step: manifest of what is at the URL
        _try_to_write(self.url)
        self._thread = threading.Thread(target=self._run, name="checkpoint upload", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether something is being copied, or asked for."""
        return self._thread.is_alive() and (self._wake.is_set() or not self._idle.is_set())

    def copy_missing(self) -> None:
        """Copy every complete checkpoint that is not at the URL yet; returns at once."""
        self._idle.clear()
        self._wake.set()

    def close(self) -> None:
        """End the thread after the file that it copies; what is missing is copied after the next start."""
        self._end.set()
        self._wake.set()

    def _run(self) -> None:
        while not self._end.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                self._copy()
            except Exception as error:  # each storage's client has errors of its own
                self._say(f"upload | not done: {one_line(error)}; tried again with the next checkpoint, the run goes "
                          "on")
            self.copying = None
            self._idle.set()

    def _copy(self) -> None:
        there = set(remote_steps(self.url)) - self._copied.keys()
        for step, path in list_steps(self.root):  # the newest first
            if self._end.is_set():
                return
            self.copying = path
            if is_misnamed_copy(path) or not (path / MANIFEST).exists():  # just removed
                continue
            manifest, target = (path / MANIFEST).read_bytes(), f"{self.url}/{path.name}"
            if self._copied.get(step) == manifest or (step in there and _is_copy(manifest, target)):
                self._copied[step] = manifest
                continue
            copied = upload(path, target, self._end.is_set)
            if copied is not None:
                self._copied[step] = manifest
                self._say(f"uploaded | {self.url}/{path.name} | {copied / 1e9:.3f} GB")


def upload(path: Path, url: str, give_up: Callable[[], bool] = lambda: False) -> int | None:
    """Copy a checkpoint's folder; returns its bytes, or None where it gave up.

    Raises DataError where the storage failed, CheckpointError where the checkpoint is not whole.
    """
    checkpoint = open_checkpoint(path, verify=False)
    files = {name: about["bytes"] for name, about in checkpoint.manifest["files"].items()}
    system, target = filesystem(url)
    with storage_errors(url):
        system.makedirs(target, exist_ok=True)
        there = _sizes(system, target)
        if MANIFEST in there:  # of the same step before a rewind: no whole checkpoint from here on
            system.rm_file(f"{target}/{MANIFEST}")
        # all of them: a file of the right size may be of an earlier checkpoint of this step
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(lambda name: give_up() or system.put_file(str(path / name), f"{target}/{name}"), files))
        if give_up():
            return None
        there = _sizes(system, target)
        if missing := next((name for name, size in files.items() if there.get(name) != size), None):
            raise DataError(f"{url}/{missing}: has not its {files[missing]} bytes after the copy; see the storage")
        system.put_file(str(path / MANIFEST), f"{target}/{MANIFEST}")
    return sum(files.values())


def _is_copy(manifest: bytes, url: str) -> bool:
    """Whether the copy at `url` has this manifest; not where the step was saved again, after a rewind.

    Raises CheckpointError where it is of another run.
    """
    system, path = filesystem(url)
    with storage_errors(url):
        found = system.cat_file(f"{path}/{MANIFEST}")
    if found == manifest:
        return True
    try:
        theirs, ours = ((parse_json(text, schemas.MANIFEST).get("recipe") or {}).get("name")
                        for text in (found, manifest))
    except DamagedFile:
        return False
    if theirs != ours:
        raise CheckpointError(f"{url}: is a checkpoint of another run ({shown(theirs)}); set checkpoint.upload to a "
                              "folder of this run's own")
    return False


def remote_steps(url: str) -> list[int]:
    """Steps of the whole checkpoints at a URL, newest first. Raises DataError where the storage failed."""
    system, path = filesystem(url)
    system.invalidate_cache()
    with storage_errors(url):
        if not system.exists(path):
            return []
        names = [name.rstrip("/").rpartition("/")[2] for name in system.ls(path, detail=False)]
        steps = [(int(match[1]), name) for name in names if (match := _STEP.match(name))]
        return sorted((step for step, name in steps if system.exists(f"{path}/{name}/{MANIFEST}")), reverse=True)


def download(url: str, run: Path, step: int | None = None) -> Checkpoint:
    """Copy a checkpoint to the run folder `run` and verify it. step: which; None: the newest whole one.

    Raises CheckpointError (none there, damaged, or the run has one of this step), DataError (the storage failed).
    """
    if not is_url(url):
        raise CheckpointError(f"{url}: is no URL; give the one of checkpoint.upload, such as s3://bucket/runs/NAME")
    steps = remote_steps(url)
    if step is None and steps:
        step = steps[0]
    if step not in steps:
        shown = f"has those of steps {', '.join(f'{n:,}' for n in steps[:8])}" if steps else "has no whole checkpoint"
        raise CheckpointError(f"{url}: {shown}{'' if step is None else f', and none of step {step:,}'}; give another "
                              "URL or --step")
    root, name = run / "checkpoints", folder_name(step)
    if (root / name).exists():
        raise CheckpointError(f"{root / name}: is there already; remove it, or give another step")
    partial = root / f"{name}.download"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        system, path = filesystem(f"{url.rstrip('/')}/{name}")
        with storage_errors(f"{url}/{name}"):
            for file in _sizes(system, path):
                system.get_file(f"{path}/{file}", str(partial / file))
        open_checkpoint(partial)
        partial.rename(root / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_checkpoint(root / name, verify=False)


def _try_to_write(url: str) -> None:
    """RecipeError where nothing can be written at the URL: found now, and not when the disk is lost."""
    try:
        system, path = filesystem(url)
        with storage_errors(url):
            system.makedirs(path, exist_ok=True)
            system.pipe_file(f"{path}/upload_test", b"written at the start of a run")
            system.rm_file(f"{path}/upload_test")
    except (DataError, RecipeError) as error:
        raise RecipeError(f"checkpoint.upload: {error}; or set checkpoint.upload=null") from None


def _sizes(system: Any, path: str) -> dict[str, int]:
    """Bytes of the files in a folder of the storage, by name."""
    system.invalidate_cache()
    return {about["name"].rpartition("/")[2]: int(about["size"]) for about in system.ls(path, detail=True)
            if about["type"] == "file"}
