"""Results of tasks, kept in a folder under the model, the task and its settings, so that a stopped command goes on.

    OUT/results/arc_easy-6f1c....json    one task of one model
    OUT/report.md, OUT/report.json       the tables (report.py)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hola_megatron.errors import RecipeError
from hola_megatron.evaluate.suite.intervals import Measure
from hola_megatron.files import FileProblem, MissingFile, read_json
from hola_megatron.files.evaluation_schemas import TASK_RESULT

FORMAT = 1
# the files of an exported folder that decide what a model says
MODEL_FILES = re.compile(r".*\.safetensors|config\.json|tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|"
                         r"vocab\.json|merges\.txt|.*\.model|.*\.bin")


@dataclass(frozen=True)
class Outcome:
    """What a task gave.

    metrics: by name, the first one first in tables. items: evaluated. seconds: it took. settings: what else the numbers
    depend on. cells: of tasks on a grid, rows of {"length", "depth", "value"}.
    """

    task: str
    metrics: dict[str, Measure]
    items: int
    seconds: float
    settings: dict[str, Any]
    cells: list[dict[str, float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: null for a number that is not finite."""
        metrics = {name: {key: None if isinstance(x, float) and not math.isfinite(x) else x
                          for key, x in asdict(measure).items()} for name, measure in self.metrics.items()}
        return asdict(self) | {"metrics": metrics}

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Outcome:
        metrics = {name: Measure(**{**values, "value": math.inf if values["value"] is None else values["value"]})
                   for name, values in stored["metrics"].items()}
        return cls(**{**stored, "metrics": metrics})


class Store:
    """Results in a folder; with folder None nothing is kept."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def get(self, model: str, task: str, settings: dict[str, Any]) -> Outcome | None:
        """The stored outcome, or None. model: its digest. RecipeError for a damaged file."""
        if self.folder is None:
            return None
        path = self._path(model, task, settings)
        try:
            stored = read_json(path, TASK_RESULT)
        except MissingFile:
            return None
        except FileProblem as problem:
            raise RecipeError(f"--out: {path} is {problem}; remove it, and its task runs again") from None
        return Outcome.of(stored["outcome"])

    def put(self, model: str, name: str, outcome: Outcome) -> None:
        """Keep an outcome. name: of the model, for the reader. Raises RecipeError where it cannot be written."""
        if self.folder is None:
            return
        path = self._path(model, outcome.task, outcome.settings)
        record = {"format": FORMAT, "model": {"name": name, "digest": model}, "outcome": outcome.to_dict()}
        write(path, json.dumps(record, indent=1) + "\n")

    def _path(self, model: str, task: str, settings: dict[str, Any]) -> Path:
        assert self.folder is not None
        key = json.dumps([FORMAT, model, task, settings], sort_keys=True)
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", task)[:80]
        return self.folder / "results" / f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def write(path: Path, text: str) -> None:
    """A file under another name until it is whole. Raises RecipeError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RecipeError(f"--out: {path} cannot be written ({error.strerror}); name a folder elsewhere") from None


def model_digest(folder: Path) -> str:
    """sha256 of the files that decide what an exported model says: weights, configuration, tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and MODEL_FILES.fullmatch(path.name):
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
