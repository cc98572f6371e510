"""The run folder: one run, found again by its name after every interruption.

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

import yaml

from hola_megatron.checkpoint.folder import Checkpoint, list_steps, newest_usable, remove, write_durably
from hola_megatron.checkpoint.save_load import TrainerState
from hola_megatron.config import Recipe, default_values
from hola_megatron.errors import CheckpointError, RecipeError, RunFolderError
from hola_megatron.parallel.groups import Layout, on_main

REWIND = "rewind.json"
CHECKPOINTED = "checkpointed"
# what may differ between the parts of one run without changing what is computed
FREE = ("run_dir", "engine", "parallel.", "checkpoint.", "log.", "valid.", "data.valid", "data.cache",
        "train.micro_batch_size", "train.recompute", "train.logits_budget_gb", "train.cuda_graph", "guard.",
        "model.backend", "model.layer_spec")


@dataclass(frozen=True)
class Resume:
    """What a run goes on from: a checkpoint, and what a rewind to it has noted since."""

    checkpoint: Checkpoint
    noted: dict[str, int]

    def state(self, loaded: TrainerState) -> TrainerState:
        """Where to go on: past the bad samples if a rewind came after the checkpoint."""
        return dataclasses.replace(loaded, **self.noted)


def open_run_folder(recipe: Recipe, layout: Layout, data_fingerprint: str, *, new: bool,
                    allow_change: bool) -> Resume | None:
    """What to go on from, or None for a new run; all ranks get the same answer or the same error.

    CheckpointError: checkpoints are there but none is usable. RecipeError: the recipe or data changed.
    RunFolderError: the folder cannot be written.
    """
    return on_main(layout, lambda: _open(recipe, data_fingerprint, new, allow_change))


def _open(recipe: Recipe, data_fingerprint: str, new: bool, allow_change: bool) -> Resume | None:
    folder = recipe.folder
    if new and folder.exists():
        _move_aside(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / ".writable", b"a full disk shows only when something is written")
        (folder / ".writable").unlink()
    except OSError as error:
        raise RunFolderError(f"{folder}: the run folder cannot be written ({error}); set run_dir to a writable place"
                             ) from None
    checkpoint, passed_over = newest_usable(folder / "checkpoints")
    for problem in passed_over:
        print(f"passed over | {problem}", flush=True)
    if checkpoint is None and list_steps(folder / "checkpoints"):
        raise CheckpointError(f"{folder}: no checkpoint of this run is usable (named above); mend one, or start over "
                              "with --new (the old folder is kept under another name)")
    if checkpoint is None and (folder / CHECKPOINTED).exists():
        raise CheckpointError(f"{folder}: this run has made checkpoints ({CHECKPOINTED}), and there are none; put "
                              "checkpoints/ back, or start over with --new (the old folder is kept under another name)")
    if checkpoint is not None and not allow_change:
        _refuse_changes(recipe, checkpoint, data_fingerprint)
    try:
        write_durably(folder / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
    except OSError as error:
        raise RunFolderError(f"{folder / 'recipe.yaml'}: cannot be written ({error}); free the disk or mend the folder"
                             ) from None
    for left in folder.glob("incidents/*/*.tmp"):  # of a save that was killed
        shutil.rmtree(left)
    return Resume(checkpoint, _noted(folder, checkpoint.step)) if checkpoint else None


def note_checkpoint(folder: Path) -> None:
    """Remember that there is a checkpoint: a start that finds none then must not begin the run again."""
    try:
        if not (folder / CHECKPOINTED).exists():
            write_durably(folder / CHECKPOINTED, b"")
    except OSError as error:
        raise RunFolderError(f"{folder / CHECKPOINTED}: cannot be written ({error}); free the disk or mend the folder"
                             ) from None


def note_rewind(folder: Path, state: TrainerState) -> None:
    """Remember that the run went back to `state.step` and on with other samples, until its next checkpoint.

    Later checkpoints belong to what was undone and go, so that the next start finds the one gone back to.
    """
    noted = {"step": state.step, "samples": state.samples, "rewinds": state.rewinds}
    try:
        write_durably(folder / f"{REWIND}.tmp", json.dumps(noted).encode())
        os.replace(folder / f"{REWIND}.tmp", folder / REWIND)
        for step, path in list_steps(folder / "checkpoints"):
            if step > state.step:
                remove(path)
    except OSError as error:
        raise RunFolderError(f"{folder}: the rewind cannot be noted ({error}); free the disk or mend the folder and "
                             "start the run again") from None


def forget_rewind(folder: Path) -> None:
    (folder / REWIND).unlink(missing_ok=True)


def _noted(folder: Path, step: int) -> dict[str, int]:
    """What the last rewind noted, if it went to `step`."""
    try:
        noted = json.loads((folder / REWIND).read_bytes())
        values = {name: int(noted[name]) for name in ("step", "samples", "rewinds")}
    except (OSError, ValueError, TypeError, KeyError):  # none, or damaged: the run rewinds again if it must
        return {}
    return values if values["step"] == step else {}


def _move_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"moved aside | {folder} -> {aside}", flush=True)


def _refuse_changes(recipe: Recipe, checkpoint: Checkpoint, data_fingerprint: str) -> None:
    # a field newer than the checkpoint: its default is what the code did before there was the field
    before, now = default_values() | _flat(checkpoint.manifest["recipe"]), _flat(recipe.to_dict())
    problems = [f"{key}: was {before.get(key)!r} when {checkpoint.path} was saved, now {now.get(key)!r}"
                for key in sorted(before | now) if before.get(key) != now.get(key) and not _is_free(key, recipe)]
    was = checkpoint.manifest.get("data_fingerprint")
    if was is not None and was != data_fingerprint:  # None: imported weights that have read no data yet
        problems.append(f"data.train: the data differ from those of {checkpoint.path} (fingerprint {str(was)[:12]}, "
                        f"now {data_fingerprint[:12]})")
    if problems:
        raise RecipeError([*problems, "a resumed run must be the same run; undo the change, resume with "
                                      "--allow-change, or start over with --new"])


def _is_free(key: str, recipe: Recipe) -> bool:
    moe = recipe.model.moe
    if key == "train.micro_batch_size" and moe.experts is not None and moe.balancing == "aux_loss":
        return False  # the loss that balances experts sees a micro-batch at a time
    return key.startswith(FREE)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
