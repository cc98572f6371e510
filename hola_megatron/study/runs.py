"""The folders of a study's runs: OUT/ARM/seed-S, with done.json or failed.json, metrics.jsonl and logs."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hola_megatron.errors import RecipeError, RunFolderError
from hola_megatron.files import FileProblem, MissingFile, read_json, study_schemas
from hola_megatron.study.table import Arm, Study

PACKAGES = ("torch", "triton", "megatron-core", "numpy")


@dataclass(frozen=True, eq=False)  # a key of dictionaries; its study is none
class Run:
    """One arm with one seed."""

    study: Study
    arm: Arm
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def done(self) -> dict[str, Any] | None:
        """What done.json holds; None while the run is not finished. Raises RunFolderError for a damaged one."""
        return self._read("done.json", study_schemas.DONE)

    @property
    def failed(self) -> dict[str, Any] | None:
        """What failed.json holds."""
        return self._read("failed.json", study_schemas.FAILED)

    def _read(self, name: str, schema: Any) -> dict[str, Any] | None:
        try:
            return read_json(self.folder / name, schema)
        except MissingFile:
            return None
        except FileProblem as problem:
            raise RunFolderError(f"{self.folder / name}: {problem}; delete the file to run {self} again") from None

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        temporary = self.folder / f"{name}.tmp"
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / name)

    @property
    def is_locked(self) -> bool:
        """Whether a process is working on it."""
        if not self.folder.is_dir():
            return False
        with self.locked() as taken:
            return not taken

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Within the context no other process works on the run; false where another one already does.

        The lock is the kernel's and ends with its process, however that ends.
        """
        lock = FileLock(self.folder / "run.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def runs_of(study: Study, out: Path) -> list[Run]:
    """All runs of the supported arms, first seeds first, so that early results compare all arms."""
    arms = study.supported()
    most = max(len(study.seeds_of(arm)) for arm in study.arms)
    return [Run(study, arm, study.seeds_of(arm)[number], out / arm.name / f"seed-{study.seeds_of(arm)[number]}")
            for number in range(most) for arm in arms if number < len(study.seeds_of(arm))]


def check_finished(runs: list[Run]) -> None:
    """Raise RecipeError where a finished run was made by another recipe or task than the study now has."""
    other = [run for run in runs if (done := run.done) and done["fingerprint"] != run.study.fingerprint(run.arm,
                                                                                                        run.seed)]
    if other:
        raise RecipeError([f"{run.folder}: {run} was finished with another recipe, task or commands than the study has "
                           "now; give another --out, or move the folder away to run it again" for run in other])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
