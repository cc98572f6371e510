"""The run folder, from which a run is resumed after an interruption.

    runs/NAME/  recipe.yaml  metrics.jsonl  loss.png  tensorboard/  checkpoints/step_NNNNNNNN/  checkpointed
                incidents/ and rewind.json after bad numbers, hang/ after a hang
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hola_megatron.checkpoint.folder import (
    Checkpoint,
    cannot_sync,
    is_misnamed_copy,
    list_steps,
    newest_usable,
    remove,
    write_durably,
)
from hola_megatron.checkpoint.save_load import TrainerState
from hola_megatron.data.opening import Data
from hola_megatron.data.phases import Phases
from hola_megatron.errors import CheckpointError, RunFolderError
from hola_megatron.files import DamagedFile, MissingFile, UnreadableFile, read_json, schemas
from hola_megatron.files.yaml_text import dump_yaml
from hola_megatron.parallel.groups import Layout, run_on_rank0
from hola_megatron.recipe.schema import Recipe
from hola_megatron.train.recipe_changes import accept_changes, changes

REWIND = "rewind.json"
CHECKPOINTED = "checkpointed"


@dataclass(frozen=True)
class Resume:
    """What a run resumes from: a checkpoint, and the record of a rewind to it."""

    checkpoint: Checkpoint
    noted: dict[str, Any]

    def state(self, loaded: TrainerState) -> TrainerState:
        """The trainer's state to resume with: after the bad samples if a rewind to this checkpoint followed."""
        return dataclasses.replace(loaded, **self.noted)


def open_run_folder(recipe: Recipe, layout: Layout, data: Data, *, allow_change: bool) -> Resume | None:
    """What to resume from, or None for a new run; equal on all ranks. A collective.

    This process owns the folder (`run_owner.own_run_folder`), so leftovers of a killed process are removed.

    Raises CheckpointError (no checkpoint of several is usable), RecipeError (recipe or data changed), RunFolderError
    (the folder cannot be written).
    """
    return run_on_rank0(layout, lambda: _open(recipe, data, allow_change))


def _open(recipe: Recipe, data: Data, allow_change: bool) -> Resume | None:
    folder = recipe.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / ".writable", b"a full disk shows only when something is written")
        (folder / ".writable").unlink()
        if problem := cannot_sync(folder):
            print(f"warning | {folder}: this file system cannot sync a folder ({problem}); the run goes on, a power "
                  "cut may lose the newest checkpoint", flush=True)
    except OSError as error:
        raise RunFolderError(f"{folder}: the run folder cannot be written ({error}); set run_dir to a writable place"
                             ) from None
    saves = folder / "checkpoints"
    if (saves.is_symlink() or saves.exists()) and not saves.is_dir():  # found now, and not at the first save
        raise RunFolderError(f"{saves}: is no folder, and checkpoints go there; remove it, or set run_dir to another "
                             "place")
    checkpoint, passed_over = newest_usable(folder / "checkpoints")
    for problem in passed_over:
        print(f"passed over | {problem}", flush=True)
    if checkpoint is None and list_steps(folder / "checkpoints"):
        raise CheckpointError(f"{folder}: no checkpoint of this run is usable (named above); mend one, or start over "
                              "with --new (the old folder is renamed)")
    if checkpoint is None and (folder / CHECKPOINTED).exists():
        raise CheckpointError(f"{folder}: this run has made checkpoints ({CHECKPOINTED}), and there are none; put "
                              "checkpoints/ back, or start over with --new (the old folder is renamed)")
    if checkpoint is not None:
        found = changes(recipe, checkpoint, data.fingerprint, data.tokenizer.identity(),
                        data.valid_fingerprint)
        accept_changes(found, checkpoint, recipe, allow=allow_change)
    else:
        _report_earlier_incidents(folder)
    try:
        write_durably(folder / "recipe.yaml", dump_yaml(recipe.to_dict()).encode())
    except OSError as error:
        raise RunFolderError(f"{folder / 'recipe.yaml'}: cannot be written ({error}); free the disk or mend the folder"
                             ) from None
    for left in folder.glob("incidents/*/*.tmp"):  # of a save that was killed
        shutil.rmtree(left)
    return Resume(checkpoint, _noted(folder, checkpoint.step)) if checkpoint else None


def note_checkpoint(folder: Path) -> None:
    """Record that the run has a checkpoint: a start that finds none must then not restart from step 0."""
    try:
        if not (folder / CHECKPOINTED).exists():
            write_durably(folder / CHECKPOINTED, b"")
    except OSError as error:
        raise RunFolderError(f"{folder / CHECKPOINTED}: cannot be written ({error}); free the disk or mend the folder"
                             ) from None


def note_rewind(folder: Path, state: TrainerState) -> None:
    """Record that the run was rewound to `state.step` and continues with other samples, until its next checkpoint.

    Later checkpoints are removed, so that the next start finds the one that was loaded.
    """
    noted = {"step": state.step, "samples": state.samples, "rewinds": state.rewinds, "phases": state.phases}
    try:
        write_durably(folder / f"{REWIND}.tmp", json.dumps(noted).encode())
        os.replace(folder / f"{REWIND}.tmp", folder / REWIND)
        for step, path in list_steps(folder / "checkpoints"):
            if step > state.step and not is_misnamed_copy(path):
                remove(path)
    except OSError as error:
        raise RunFolderError(f"{folder}: the rewind cannot be noted ({error}); free the disk or mend the folder and "
                             "start the run again") from None


def forget_rewind(folder: Path) -> None:
    """Remove the record of the last rewind."""
    (folder / REWIND).unlink(missing_ok=True)


def _noted(folder: Path, step: int) -> dict[str, Any]:
    """The record of the last rewind, if it was to `step`."""
    try:
        noted = read_json(folder / REWIND, schemas.REWIND)
        phases = Phases.from_dicts(noted["phases"]).to_dicts() if noted.get("phases") else None
    except MissingFile:
        return {}
    except UnreadableFile as problem:
        raise RunFolderError(f"{folder / REWIND}: {problem}; mend the folder and start the run again") from None
    except (DamagedFile, CheckpointError) as problem:  # the run rewinds again if it must
        print(f"rewind forgotten | {folder / REWIND}: {problem}; samples skipped by the last rewind come again",
              flush=True)
        return {}
    values = {name: noted[name] for name in ("step", "samples", "rewinds")}
    if phases:  # those of the samples read since the checkpoint
        values["phases"] = phases
    return values if values["step"] == step else {}


def _report_earlier_incidents(folder: Path) -> None:
    """A run that ended with code 4 before its first checkpoint begins anew, and with the same recipe as before."""
    incidents = sorted(folder.glob("incidents/step_*"))
    if incidents:
        print(f"before | an earlier start of this run met bad numbers before its first checkpoint: {incidents[-1]}; it "
              "begins anew, and meets them again unless the recipe has changed", flush=True)


def move_aside(folder: Path) -> Path:
    """Give an earlier run's folder another name, and return that."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"moved aside | {folder} -> {aside}", flush=True)
    return aside
