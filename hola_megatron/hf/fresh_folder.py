"""Atomic creation of a folder: it is either complete under its name or absent."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from hola_megatron.errors import CheckpointError
from hola_megatron.files.ownership import beside, owned
from hola_megatron.paths import path_problem


@contextlib.contextmanager
def fresh_folder(out: Path, *, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """A temporary folder next to `out`, renamed to it at the end of the context, and removed after any error.

    overwrite: replace an existing folder that has the file `marker` (one of ours); another is
    never touched. Raises CheckpointError, or FolderInUseError: another process is writing to `out`.
    """
    refuse_existing(out, overwrite, marker)
    whole = out.absolute()
    partial = whole.parent / f".{whole.name}.partial"
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        with owned(beside(out, "wait for its end, or choose another name")):
            refuse_existing(out, overwrite, marker)  # who owned it before may have made it
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            try:
                partial.mkdir()
                yield partial
                refuse_existing(out, overwrite, marker)  # something that takes no lock may have made it
                put_in_place(partial, whole, overwrite)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: could not be written ({error}); check permissions and free space") from error


def put_in_place(partial: Path, whole: Path, overwrite: bool) -> None:
    """Give the finished folder its name. OSError if a folder that is not empty has it, and is not to be replaced."""
    old = whole.parent / f".{whole.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if whole.is_symlink() or (overwrite and whole.exists()):
        whole.rename(old)
    partial.rename(whole)  # replaces an empty folder
    shutil.rmtree(old, ignore_errors=True)


def refuse_existing(out: Path, overwrite: bool, marker: str | None) -> None:
    """CheckpointError unless `out` may be written."""
    if problem := path_problem("out", out):
        raise CheckpointError(problem)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if marker is None or not (out / marker).is_file():
        raise CheckpointError(f"{out}: exists and is no folder written by this tool; choose another name")
    if not overwrite:
        raise CheckpointError(f"{out}: exists; choose another name, or pass --overwrite to replace it")
