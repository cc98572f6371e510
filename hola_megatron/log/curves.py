"""Curves of several runs in one picture and one table, from their metrics.jsonl.

Runs whose recipes differ in the seed alone are one curve: the mean, and the range of the seeds shaded.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from hola_megatron.errors import RunFolderError
from hola_megatron.files import FileProblem, MissingFile, read_text
from hola_megatron.files.yaml_text import parse_yaml
from hola_megatron.log.metrics import read_rows

By = Literal["tokens", "hours", "steps"]
SECTIONS_OF_NO_INTEREST = ("log", "checkpoint", "guard", "parallel")
SEED_OF_NAME = re.compile(r"[-_.](s|seed)?[-_.]?[0-9]+$")
LAST_SHARE = 20  # the training loss of the table is the mean of the last 1/20 of the logged steps
TRAIN, VALID = "train", "valid"


@dataclass(frozen=True)
class RunCurves:
    """What one run has logged.

    name: of its recipe. alike: equal for runs that differ in the seed alone; None where its recipe is not there.
    losses: {"train", "valid" or "valid/NAME": {step: loss}}. tokens, hours: {step: so far} at the logged steps.
    speed: tokens a second, of the last logged step; None where it is not logged.
    """

    folder: Path
    name: str
    alike: str | None
    losses: dict[str, dict[int, float]]
    tokens: dict[int, float]
    hours: dict[int, float]
    speed: float | None

    def place(self, step: int, by: By) -> float:
        """Where a step is on the axis; between logged steps on a line."""
        known = {"tokens": self.tokens, "hours": self.hours, "steps": {}}[by]
        if by == "steps" or not known:
            return float(step)
        if step in known:
            return known[step]
        steps = [0, *known]
        at = min(max(bisect_left(steps, step), 1), len(steps) - 1)
        before, after = steps[at - 1], steps[at]
        first = known.get(before, 0.0)
        return first + (known[after] - first) * (step - before) / (after - before)


def read_run(folder: Path) -> RunCurves:
    """The curves of a run folder. Raises RunFolderError where there are none."""
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such run folder; give the folders of runs (runs/NAME)")
    rows = read_rows(folder / "metrics.jsonl")
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["kind"].partition("/")[0] in (TRAIN, VALID) and isinstance(row.get("loss"), int | float):
            losses.setdefault(row["kind"], {})[row["step"]] = row["loss"]
    if not losses:
        raise RunFolderError(f"{folder}: no loss in its metrics.jsonl; give the folder of a run that has made a step")
    trained = [row for row in rows if row["kind"] == TRAIN and isinstance(row.get("tokens"), int | float)]
    recipe = _recipe(folder)
    speeds = [row["tokens_per_second"] for row in trained if _is_speed(row)]
    return RunCurves(folder, str(recipe.get("name") or folder.name), _alike(recipe), losses,
                     {row["step"]: float(row["tokens"]) for row in trained}, _hours(trained),
                     speeds[-1] if speeds else None)


def _is_speed(row: dict[str, Any]) -> bool:
    speed = row.get("tokens_per_second")
    return isinstance(speed, int | float) and speed > 0


def _hours(rows: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Hours in training steps: without validation, checkpoints and stops. Empty where no speed is logged."""
    rows = [row for row in rows if _is_speed(row)]
    if not rows:
        return {}
    first, after = rows[0], rows[min(1, len(rows) - 1)]
    # tokens of the steps up to the first row, which may follow those of an earlier run
    per_step = ((after["tokens"] - first["tokens"]) / (after["step"] - first["step"]) if after["step"] > first["step"]
                else first["tokens"] / max(first["step"], 1))
    hours = {first["step"]: per_step * first["step"] / first["tokens_per_second"] / 3600}
    for row, following in pairwise(rows):
        taken = max(following["tokens"] - row["tokens"], 0)
        hours[following["step"]] = hours[row["step"]] + taken / following["tokens_per_second"] / 3600
    return hours


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(read_text(folder / "recipe.yaml"))
    except MissingFile:
        return {}
    except FileProblem as problem:
        raise RunFolderError(f"{folder / 'recipe.yaml'}: {problem}; mend the folder, or leave the run out") from None
    return values if isinstance(values, dict) else {}


def _alike(recipe: dict[str, Any]) -> str | None:
    """A text that is equal for recipes that differ in the seed, names and reports alone."""
    if not recipe:
        return None
    kept = {name: value for name, value in recipe.items()
            if name not in ("name", "run_dir", *SECTIONS_OF_NO_INTEREST)}
    if isinstance(kept.get("train"), dict):
        kept["train"] = {name: value for name, value in kept["train"].items() if name != "seed"}
    return repr(sorted(kept.items()))


@dataclass(frozen=True)
class Group:
    """Runs that are one curve."""

    label: str
    runs: tuple[RunCurves, ...]

    def curve(self, kind: str, by: By, smooth: int) -> list[tuple[float, float, float, float]]:
        """(place, mean, least, most) over the runs at every step; smooth: logged steps of a running mean."""
        smoothed = [_running_mean(run.losses.get(kind, {}), smooth) for run in self.runs]
        points = []
        for step in sorted({step for values in smoothed for step in values}):
            values = [found[step] for found in smoothed if step in found]
            places = [run.place(step, by) for run, found in zip(self.runs, smoothed, strict=True) if step in found]
            points.append((sum(places) / len(places), sum(values) / len(values), min(values), max(values)))
        return points


def group(runs: Sequence[RunCurves], *, each: bool = False) -> list[Group]:
    """Runs that differ in the seed alone together, in the order given. each: every run is a group of its own."""
    found: dict[object, list[RunCurves]] = {}
    for number, run in enumerate(runs):
        found.setdefault(number if each or run.alike is None else run.alike, []).append(run)
    labels = [_label(members) for members in found.values()]
    return [Group(label if labels.count(label) == 1 else str(members[0].folder), tuple(members))
            for label, members in zip(labels, found.values(), strict=True)]


def _label(runs: Sequence[RunCurves]) -> str:
    names = {run.name for run in runs}
    if len(names) > 1:  # hola-1, hola_seed2, hola-s3
        names = {SEED_OF_NAME.sub("", name) or name for name in names}
    name = names.pop() if len(names) == 1 else runs[0].name
    return name if len(runs) == 1 else f"{name} ({len(runs)} seeds)"


def _running_mean(values: dict[int, float], width: int) -> dict[int, float]:
    """The mean of each value and the up to width - 1 before it."""
    steps = sorted(values)
    return {step: sum(values[s] for s in steps[max(at - width + 1, 0) : at + 1]) / min(width, at + 1)
            for at, step in enumerate(steps)}


def table(groups: Sequence[Group]) -> str:
    """Markdown: one row a group, with the range of several seeds in brackets."""
    kinds = sorted({kind for group in groups for run in group.runs for kind in run.losses if kind != TRAIN})
    head = ["run", "steps", "tokens", "hours in steps", "tokens/s", "training loss",
            *("validation loss" if kind == VALID else f"validation loss of {kind.partition('/')[2]}"
              for kind in kinds)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for found in groups:
        runs = found.runs
        steps = [max(max(values) for values in run.losses.values()) for run in runs]
        lines.append([found.label, _range(steps, "{:,.0f}"),
                      _range([max(run.tokens.values(), default=None) for run in runs], "{:,.0f}"),
                      _range([max(run.hours.values(), default=None) for run in runs], "{:.3g}"),
                      _range([run.speed for run in runs], "{:,.0f}"),
                      _range([_last_train(run) for run in runs], "{:.4f}"),
                      *(_range([_last(run.losses.get(kind, {})) for run in runs], "{:.4f}") for kind in kinds)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _last(values: dict[int, float]) -> float | None:
    return values[max(values)] if values else None


def _last_train(run: RunCurves) -> float | None:
    values = run.losses.get(TRAIN, {})
    taken = sorted(values)[-max(len(values) // LAST_SHARE, 1):]
    return sum(values[step] for step in taken) / len(taken) if taken else None


def _range(values: Sequence[float | None], form: str) -> str:
    """The mean, and the least and the most where they differ; "-" where nothing is known."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, least, most = (form.format(value) for value in (sum(known) / len(known), min(known), max(known)))
    return mean if least == most else f"{mean} ({least} to {most})"


def draw(groups: Sequence[Group], path: Path, *, by: By = "tokens", smooth: int = 1) -> None:
    """Draw training and validation loss as a picture. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = sorted({kind for group in groups for run in group.runs for kind in run.losses})
    panels = [("training loss", [kind for kind in kinds if kind == TRAIN]),
              ("validation loss", [kind for kind in kinds if kind != TRAIN])]
    panels = [(title, found) for title, found in panels if found]
    figure = Figure(figsize=(6 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for style, kind in zip(("-", "--", ":", "-.") * len(found), found, strict=False):
            for number, its in enumerate(groups):
                if points := its.curve(kind, by, smooth if kind == TRAIN else 1):
                    places, mean, least, most = zip(*points, strict=True)
                    name = kind.partition("/")[2]
                    (line,) = axes.plot(places, mean, style, color=f"C{number % 10}", lw=1.3,
                                        marker="o" if kind != TRAIN else None, ms=3,
                                        label=f"{its.label}, {name}" if name else its.label)
                    axes.fill_between(places, least, most, color=line.get_color(), alpha=0.2, lw=0)
        axes.set(xlabel={"hours": "hours in training steps"}.get(by, by), ylabel="nats a token", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format=path.suffix.removeprefix(".") or "png")
