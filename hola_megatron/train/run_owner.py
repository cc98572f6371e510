"""Ownership of a run folder: one run, through its rank 0; and a check that all its ranks see the same folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from hola_megatron.errors import RunFolderError
from hola_megatron.files.ownership import Owner, inside, read_owner, take
from hola_megatron.parallel.groups import Layout, run_on_rank0
from hola_megatron.recipe.schema import Recipe
from hola_megatron.startup import roll_call
from hola_megatron.train.run_folder import move_aside

ADVICE = "wait for its end, stop it, or give this run another name or run_dir"
OTHERS = {"dataset.json": "a prepared dataset", "hola_export.json": "an exported model"}
SEEN_SECONDS = 20  # a network file system may show another node's new file that late


@contextlib.contextmanager
def own_run_folder(recipe: Recipe, layout: Layout, *, new: bool) -> Iterator[None]:
    """Own the folder inside the context, so that no other run can use it. Call on every rank.

    new: an earlier run's folder is moved aside first, if nobody owns it. Raises, on all ranks, FolderInUseError that
    names the owner, or RunFolderError: the folder cannot be written, or is not one folder for all ranks.
    """
    owners: list[Owner] = []

    def take_it() -> str:
        owners.append(_take(recipe.folder, new))
        return owners[0].who.token

    token = run_on_rank0(layout, take_it)
    try:
        _compare_folder(recipe.folder, token)
        yield
    finally:
        for owner in owners:
            owner.release()


def _take(folder: Path, new: bool) -> Owner:
    locks = inside(folder, ADVICE)
    try:
        _refuse_another_use(folder)
        existed = folder.exists()
        if new and existed and Path.cwd().is_relative_to(folder.resolve()):  # "." would follow the moved folder
            raise RunFolderError(f"{folder}: this program was started inside the run folder, which --new moves aside; "
                                 "set run_dir to another folder, or start the command elsewhere")
        folder.mkdir(parents=True, exist_ok=True)
        owner = take(locks)
        if new and existed:
            try:
                aside = move_aside(folder)
            except BaseException:
                owner.release()
                raise
            owner.release(moved_to=aside)
            folder.mkdir(parents=True, exist_ok=True)
            owner = take(locks)
        return owner
    except OSError as error:
        raise RunFolderError(f"{folder}: the run folder cannot be written ({error}); set run_dir to a writable place"
                             ) from None


def _refuse_another_use(folder: Path) -> None:
    """RunFolderError for a dataset or an export: their --overwrite would remove the run's checkpoints."""
    for name, what in OTHERS.items():
        if (folder / name).is_file():
            raise RunFolderError(f"{folder}: holds {what} ({name}), and a run needs a folder of its own; set run_dir "
                                 "to another one")


def _compare_folder(folder: Path, token: str) -> None:
    """RunFolderError unless all ranks see the same folder, as they must to write a checkpoint."""
    roll = roll_call.current()
    if roll is None:
        return
    locks, deadline = inside(folder, ADVICE), time.monotonic() + SEEN_SECONDS
    while not (seen := (who := read_owner(locks)) is not None and who.token == token) and time.monotonic() < deadline:
        time.sleep(0.1)
    shown = "the folder of rank 0" if seen else f"another folder ({folder.absolute()})"
    roll.compare(roll_call.FOLDER, {"run_dir": (seen, shown)}, RunFolderError,
                 "set run_dir to a disk that all nodes share, under one absolute path")
