"""Metrics in metrics.jsonl, TensorBoard and Weights & Biases.

A resumed run continues the same files. Rows of steps that will be run again are dropped, so no step appears twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from pathlib import Path
from typing import Any

from hola_megatron.errors import RunFolderError
from hola_megatron.files import FileProblem, MissingFile, parse_json_lines, read_bytes, schemas
from hola_megatron.log.reports import Reports
from hola_megatron.recipe.schema import Recipe

METRICS_LIMIT = 1 << 34
BOARD, WANDB = "TensorBoard", "Weights & Biases"
CLOSE_SECONDS = 30.0  # Weights & Biases uploads the rest


class Metrics:
    """Writes rows {"step": ..., "kind": "train" | "valid" | "memory" | ..., name: number}, on one rank."""

    def __init__(self, recipe: Recipe, folder: Path, from_step: int):
        self.path, self._folder = folder / "metrics.jsonl", folder
        self._tensorboard, self._board, self._wandb = recipe.log.tensorboard, None, None
        self.reports = Reports()
        self._open(from_step)
        if recipe.log.wandb_project:
            self.reports.attempt(WANDB, lambda: setattr(self, "_wandb", _open_wandb(recipe, folder)))

    def _open(self, from_step: int) -> None:
        try:
            drop_rows_after(self.path, from_step)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be written ({error}); free the disk or mend the folder"
                                 ) from None
        if self._tensorboard:
            self.reports.send(BOARD, lambda: setattr(self, "_board", _open_tensorboard(self._folder, from_step)))

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, to which the run was rewound."""
        self._file.close()
        if self._tensorboard:
            self.reports.send(BOARD, lambda: self._board.close())
        self._open(step)

    def write(self, row: dict[str, Any]) -> None:
        """Write one row to metrics.jsonl, and asynchronously to TensorBoard and Weights & Biases."""
        self._line(row)
        numbers = {f"{row['kind']}/{name}": value for name, value in row.items()
                   if name not in ("step", "kind") and isinstance(value, (int, float)) and not isinstance(value, bool)}
        if self._tensorboard:
            self.reports.send(BOARD, lambda: self._add_scalars(numbers, row["step"]))
        if self._wandb:
            self.reports.send(WANDB, lambda: self._wandb.log(numbers, step=row["step"]))

    def _add_scalars(self, numbers: dict[str, Any], step: int) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def _line(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be written ({error}); checkpoints are untouched, free the disk "
                                 "or mend the folder and start the run again") from None

    def text(self, step: int, text: str) -> None:
        """Write a sample text."""
        self._line({"step": step, "kind": "sample", "text": text})
        if self._tensorboard:
            self.reports.send(BOARD, lambda: self._board.add_text("sample", text, step))

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Close the files. seconds: maximum wait for TensorBoard and Weights & Biases."""
        with contextlib.suppress(OSError):  # a full disk has been reported
            self._file.close()
        if self._tensorboard:
            self.reports.send(BOARD, lambda: self._board.close())
        if self._wandb:
            self.reports.send(WANDB, lambda: self._wandb.finish())
        self.reports.close(seconds)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows, without damaged or truncated lines. Raises RunFolderError."""
    try:
        text = read_bytes(path, limit=METRICS_LIMIT).decode("utf-8", errors="replace")
    except MissingFile:
        return []
    except FileProblem as problem:
        raise RunFolderError(f"{path}: {problem}; move it away or mend the folder") from None
    return list(parse_json_lines(text, schemas.METRICS_ROW))


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of steps that will be run again."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def _open_tensorboard(folder: Path, from_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    _hide_tensorboard_tracebacks()
    return SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)


def _open_wandb(recipe: Recipe, folder: Path) -> Any:
    import wandb  # installed: `missing_packages` has checked

    name = folder / "wandb_id.txt"
    if not name.exists():
        name.write_text(secrets.token_hex(4))
    return wandb.init(project=recipe.log.wandb_project, name=recipe.name, id=name.read_text().strip(), resume="allow",
                      dir=str(folder), config=recipe.to_dict())


def _hide_tensorboard_tracebacks() -> None:
    """Hide errors of TensorBoard's writer thread: it raises them again at our next call, where they are reported."""
    before = threading.excepthook
    if getattr(before, "__name__", "") == "quiet_hook":  # a hook need not be a function
        return

    def quiet_hook(args: Any) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)
    threading.excepthook = quiet_hook
