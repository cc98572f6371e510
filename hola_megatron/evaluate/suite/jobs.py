"""What is run on a model: one task with its settings, and the models they run on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from hola_megatron.evaluate.load import exported, load
from hola_megatron.evaluate.reader import ModelReader
from hola_megatron.evaluate.suite.intervals import Measure, measured
from hola_megatron.evaluate.suite.results import Outcome, model_digest


@dataclass(frozen=True)
class Reading:
    """How models are read: see `load` and ModelReader.

    window: None: the length that the model was trained at.
    """

    batch: int = 8
    window: int | None = None
    dtype: torch.dtype | None = None
    device: str | None = None
    trust_remote_code: bool = False


@dataclass
class Subject:
    """A model under evaluation: its exported folder, loaded when it is first needed."""

    name: str
    folder: Path
    reading: Reading
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.digest = model_digest(self.folder)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return load(self.folder, dtype=self.reading.dtype, device=self.reading.device,
                    trust_remote_code=self.reading.trust_remote_code)

    @property
    def tokenizer(self) -> Any:
        return self.loaded[1]

    @property
    def window(self) -> int:
        return self.reading.window or getattr(self.loaded[0].config, "max_position_embeddings", None) or 2048

    @cached_property
    def reader(self) -> ModelReader:
        return ModelReader(*self.loaded, batch=self.reading.batch, window=self.window, progress=True)


@contextlib.contextmanager
def opened(path: Path, reading: Reading, tokenizer: str | None = None) -> Iterator[Subject]:
    """The model at `path`: an exported folder, a run folder or a checkpoint."""
    with exported(path, tokenizer) as folder:
        yield Subject(str(path), folder, reading)


class Job(Protocol):
    """One task with its settings, `settings` being all that its numbers depend on besides the model."""

    task: str
    settings: dict[str, Any]

    def check(self, subject: Subject) -> None:
        """Raise what can be known before anything is run."""
        ...

    def run(self, subject: Subject) -> Outcome:
        """Run it. Raises what the task raises."""
        ...


@dataclass
class HarnessJob:
    """A task of lm-evaluation-harness. data: None: the Hugging Face hub. limit: items, None: all."""

    task: str
    data: Path | None
    limit: int | None
    reading: Reading

    @cached_property
    def settings(self) -> dict[str, Any]:
        from importlib.metadata import version

        from hola_megatron.evaluate.harness.local_data import task_file

        records = "hub" if self.data is None else task_file(self.data, self.task).sha256()
        return {"kind": "lm-eval", "lm_eval": version("lm_eval"), "records": records, "limit": self.limit,
                **reading_settings(self.reading)}

    def check(self, subject: Subject) -> None:
        """Names and files are checked by harness.tasks, before a model is read."""

    def run(self, subject: Subject) -> Outcome:
        from hola_megatron.evaluate.harness.adapter import HarnessModel
        from hola_megatron.evaluate.harness.tasks import load_task, run_task

        start, task = time.monotonic(), load_task(self.task, self.data)
        found = run_task(HarnessModel(subject.reader, subject.tokenizer, subject.window), self.task, task,
                         limit=self.limit)
        metrics = {name: measured(value, found.values.get(name), found.statistics.get(name))
                   for name, value in found.metrics.items()}
        return Outcome(self.task, metrics, found.items, time.monotonic() - start, self.settings)


def reading_settings(reading: Reading) -> dict[str, Any]:
    """What of a Reading changes numbers; batch and device do so by rounding only."""
    return {"window": reading.window, "dtype": str(reading.dtype).removeprefix("torch.") if reading.dtype else None}


def share(right: list[float]) -> Measure:
    """The mean of items' scores in 0 to 1, with its interval."""
    return measured(sum(right) / len(right), right, None)
