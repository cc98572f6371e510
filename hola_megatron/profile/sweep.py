"""Profiling every combination of some settings, each in processes of its own. Implements tools/profile.py --sweep.

Whatever goes wrong with a combination is its row: out of memory, a layout that the recipe refuses, a run that does
not end.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hola_megatron.errors import RecipeError
from hola_megatron.log.console import short
from hola_megatron.profile.profile_report import table

COMBINATIONS = 256


@dataclass(frozen=True)
class Row:
    """One combination: its profile, or why there is none."""

    settings: dict[str, str]
    numbers: dict[str, Any] | None = None
    problem: str | None = None


def combinations(sweeps: list[str]) -> list[dict[str, str]]:
    """["a.b=1,2", "c.d=x,y"] -> four settings, the last key changing fastest. Raises RecipeError."""
    axes, problems = {}, []
    for text in sweeps:
        key, _, values = text.partition("=")
        found = [value for value in values.split(",") if value]
        if not key or not found:
            problems.append(f"--sweep {text!r}: is written section.key=value,value, for example "
                            "train.micro_batch_size=8,16")
        elif key in axes:
            problems.append(f"--sweep {text!r}: {key} is given twice; put all its values into one")
        axes[key] = found
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > COMBINATIONS and not problems:
        problems.append(f"--sweep: {count} combinations are more than {COMBINATIONS}; give fewer values")
    if problems:
        raise RecipeError(problems)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def run_sweep(program: Path, arguments: list[str], settings: list[dict[str, str]], *, ranks: int, timeout_s: float,
              log: Callable[[str], None] = print) -> list[Row]:
    """`program arguments` with each of the settings as overrides, one after the other."""
    launcher = ["-m", "hola_megatron.launch", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    rows = []
    for chosen in settings:
        overrides = [f"{key}={value}" for key, value in chosen.items()]
        command = [sys.executable, *launcher, str(program), *arguments, *overrides]
        row = Row(chosen, *outcome(command, timeout_s))
        log(f"{' '.join(overrides)}: {_in_short(row)}")
        rows.append(row)
    return rows


def sweep_table(rows: list[Row]) -> str:
    """Markdown: a row a combination, in the order they ran."""
    head = (*rows[0].settings, "tok/s a rank", "ms a step", "MFU %", "HFU %", "peak GB", "first step s", "")
    return "\n".join(table(head, [(*row.settings.values(), *_cells(row)) for row in rows]))


def sweep_json(rows: list[Row]) -> str:
    """The rows as JSON."""
    return json.dumps([vars(row) for row in rows], indent=1)


def _cells(row: Row) -> list[str]:
    n = row.numbers
    if n is None:
        return [*["-"] * 6, row.problem.replace("|", "/")]
    share = [f"{100 * n[name]:.1f}" if name in n else "n/a" for name in ("mfu", "hfu")]
    return [short(n["tokens_per_second_per_rank"]), f"{n['ms_per_step']:.1f}", *share, f"{n['memory_gb']:.1f}",
            f"{n['first_step_s']:.1f}", ""]


def _in_short(row: Row) -> str:
    if row.numbers is None:
        return row.problem
    return f"{short(row.numbers['tokens_per_second_per_rank'])} tok/s a rank, {row.numbers['memory_gb']:.1f} GB"


def outcome(command: list[str], timeout_s: float) -> tuple[dict[str, Any] | None, str | None]:
    """(numbers, None) that a command writes to the file it is given by --json, or (None, why there are none)."""
    with tempfile.TemporaryDirectory() as folder:
        found, log = Path(folder) / "numbers.json", Path(folder) / "log"
        code = _finish([*command, "--json", str(found)], log, timeout_s)
        output = log.read_text(errors="replace")
        numbers = json.loads(found.read_text()) if found.exists() else {}
    if "out_of_memory" in numbers:
        return None, "out of memory"
    return (numbers, None) if code == 0 else (None, _what_went_wrong(code, output, timeout_s))


def _finish(command: list[str], log: Path, timeout_s: float) -> int | None:
    """The exit code; None if it had to be ended (with every process it started)."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, "PYTHONUNBUFFERED": "1"})
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _what_went_wrong(code: int | None, output: str, timeout_s: float) -> str:
    if code is None:
        return f"no end within {timeout_s:g} s"
    named = dict.fromkeys(re.findall(r"^\w+Error: (.+)$", output, re.MULTILINE))  # each once: every rank may print it
    if named:
        return "; ".join(named)[:300]
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    # an error without a message, or of another name: the first line after a traceback
    _, found, last = output.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in last.splitlines() if line and not line.startswith(" ")] if found else []
    return f"ended with code {code}" + (f": {lines[0][:300]}" if lines else "")
