"""One run of the trainer on a recipe's own data, and the study's commands after it."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from hola_megatron.errors import RunFolderError, UserError
from hola_megatron.files import FileProblem, read_json, read_text, schemas
from hola_megatron.log.metrics import read_rows
from hola_megatron.study.runs import Run
from hola_megatron.study.table import Study

LAUNCHER = ["-m", "hola_megatron.launch", "--nproc-per-node"]
MODULE = "hola_megatron.train"
LOG, PREPARED = "run.log", "before.done"


class CommandError(UserError):
    """A command of a run ended with another code than 0."""


def commands_of(run: Run, ranks: int, more: list[str]) -> list[list[str]]:
    """The command lines of a run: the trainer with `ranks` processes, then the study's `after`."""
    folder = run.folder / "run"
    start = [sys.executable, *LAUNCHER, str(ranks)] if ranks > 1 else [sys.executable]
    train = [*start, "-m", MODULE, str(run.study.recipe_path(run.arm)), *run.study.settings(run.arm, run.seed, *more),
             f"run_dir={folder}"]
    values = {"run": str(folder), "arm": run.arm.name, "seed": str(run.seed), "measures": str(run.folder / "measures")}
    after = [[_filled(word, values) for word in shlex.split(line)] for line in run.study.after]
    return [train, *map(_python, after)]


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word


def not_prepared(study: Study, out: Path) -> list[list[str]]:
    """The command lines of the study's `before` that are not done yet in this folder."""
    words = [_python([_filled(word, {"out": str(out)}) for word in shlex.split(line)]) for line in study.before]
    try:
        done = read_text(out / PREPARED).splitlines()
    except FileProblem:
        done = []
    return [line for line in words if shlex.join(line) not in done]


def run_before(study: Study, out: Path) -> None:
    """Run the study's `before`, each command once. Raises CommandError."""
    for words in not_prepared(study, out):
        with (out / "before.log").open("a", encoding="utf-8") as log:
            code = _call(words, log)
        if code:
            raise CommandError(f"{shlex.join(words)[:200]}: ended with code {code}; {out / 'before.log'} says why")
        with (out / PREPARED).open("a", encoding="utf-8") as done:
            done.write(shlex.join(words) + "\n")


def _python(words: list[str]) -> list[str]:
    return [sys.executable, *words[1:]] if words[0] == "python" else words


def run_recipe(run: Run, ranks: int, more: list[str]) -> dict[str, float]:
    """Run the commands, which log to run.log. Returns the last validation and all measures/*.json.

    The trainer resumes by itself. Raises CommandError for a command that fails.
    """
    (run.folder / "measures").mkdir(parents=True, exist_ok=True)
    for words in commands_of(run, ranks, more):
        with (run.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            code = _call(words, log)
        if code:
            raise CommandError(f"{shlex.join(words)[:200]}: ended with code {code}; {run.folder / LOG} says why")
    return {**_validation(run.folder / "run"), **_measures(run.folder / "measures")}


def _call(words: list[str], log: TextIO) -> int:
    """The exit code of a command. It is told to stop, and waited for, when this process is."""
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()  # the trainer saves a checkpoint
            child.wait()
            raise


def _validation(folder: Path) -> dict[str, float]:
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "valid" and row["loss"] is not None]
    return {} if not rows else {"valid/loss": rows[-1]["loss"], "valid/perplexity": math.exp(min(rows[-1]["loss"], 50))}


def _measures(folder: Path) -> dict[str, float]:
    """All numbers of folder/*.json, by file and path."""
    found: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            _collect(read_json(path, schemas.MAPPING), path.stem, found)
        except FileProblem as problem:
            raise RunFolderError(f"{path}: {problem}; delete it and start the study again") from None
    return found


def _collect(value: object, name: str, found: dict[str, float]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _collect(inner, f"{name}/{key}", found)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        found[name] = value
