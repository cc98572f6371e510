"""A folder that is either whole under its name or not there at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from hola_megatron.errors import CheckpointError


@contextlib.contextmanager
def fresh_folder(out: Path, *, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends, and goes away on any error.

    overwrite: replace an existing folder that holds the file `marker` (and so is one of ours); another is
    never touched. Raises CheckpointError.
    """
    refuse_existing(out, overwrite, marker)
    whole = out.absolute()
    partial, old = whole.parent / f".{whole.name}.partial", whole.parent / f".{whole.name}.old"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if whole.exists():
            whole.rename(old)
        partial.rename(whole)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: could not be written ({error}); check permissions and free space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path, overwrite: bool, marker: str | None) -> None:
    """CheckpointError unless `out` may be written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if marker is None or not (out / marker).is_file():
        raise CheckpointError(f"{out}: exists and is no folder written by this tool; choose another name")
    if not overwrite:
        raise CheckpointError(f"{out}: exists; choose another name, or pass --overwrite to replace it")
