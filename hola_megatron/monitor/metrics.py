"""metrics.jsonl, TensorBoard and Weights & Biases: one row of numbers, three places.

A resumed run continues the same files. Rows of steps that will be run again are dropped, so
no step appears twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from hola_megatron.config import Recipe
from hola_megatron.errors import RunFolderError


class Metrics:
    """Writes rows {"step": ..., "kind": "train" | "valid" | "memory" | ..., name: number}; one rank has one."""

    def __init__(self, recipe: Recipe, folder: Path, from_step: int):
        self.path, self._folder = folder / "metrics.jsonl", folder
        self._tensorboard = recipe.log.tensorboard
        self._open(from_step)
        self._wandb = _open_wandb(recipe, folder) if recipe.log.wandb_project else None

    def _open(self, from_step: int) -> None:
        try:
            drop_rows_after(self.path, from_step)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be written ({error}); free the disk or mend the folder"
                                 ) from None
        self._board = _open_tensorboard(self._folder, from_step) if self._tensorboard else None

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: what came after it did not happen."""
        self._file.close()
        if self._board:
            self._board.close()
        self._open(step)

    def write(self, row: dict[str, Any]) -> None:
        """One row; it is on disk when this returns."""
        self._line(row)
        numbers = {f"{row['kind']}/{name}": value for name, value in row.items()
                   if name not in ("step", "kind") and isinstance(value, (int, float)) and not isinstance(value, bool)}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, row["step"])
        if self._wandb:
            self._wandb.log(numbers, step=row["step"])

    def _line(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be written ({error}); checkpoints are untouched, free the disk "
                                 "or mend the folder and start the run again") from None

    def text(self, step: int, text: str) -> None:
        """A sample text."""
        self._line({"step": step, "kind": "sample", "text": text})
        if self._board:
            self._board.add_text("sample", text, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk refused has been told
            self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a line cut short by a kill, or damaged, is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("kind"), str):
                rows.append(row)
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Leave out rows of steps that will be run again."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def _open_tensorboard(folder: Path, from_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)


def _open_wandb(recipe: Recipe, folder: Path) -> Any:
    import wandb  # `missing_packages` has looked for it

    name = folder / "wandb_id.txt"
    if not name.exists():
        name.write_text(secrets.token_hex(4))
    return wandb.init(project=recipe.log.wandb_project, name=recipe.name, id=name.read_text().strip(), resume="allow",
                      dir=str(folder), config=recipe.to_dict())
