"""Pictures of a study: curves over steps, measures over the number of pairs, with the range of the seeds shaded."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hola_megatron.log.metrics import read_rows
from hola_megatron.study.intervals import interval
from hola_megatron.study.rules import Results
from hola_megatron.study.runs import Run

Points = dict[float, list[float]]  # x -> values of the seeds
_TEST = re.compile(r"accuracy/length_(\d+)/pairs_(\d+)")
COLOURS = ("#000000", "#7f7f7f", "#1f77b4", "#17becf", "#ff7f0e", "#bcbd22", "#d62728", "#e377c2", "#9467bd",
           "#8c564b", "#2ca02c")
STYLES = ("-", "--", ":")


def draw(runs: Sequence[Run], results: Results, folder: Path) -> list[tuple[str, str]]:
    """Write the pictures; returns (file name, caption) of each."""
    arms = list(dict.fromkeys(run.arm.name for run in runs))
    rows = {(run.arm.name, run.seed): read_rows(run.folder / "metrics.jsonl")
            or read_rows(run.folder / "run/metrics.jsonl") for run in runs}
    pictures = []
    panels = [(title, found) for title, kind, name in (
        ("training loss, nats a predicted token", "train", "loss"), ("validation loss", "valid", "loss"),
        ("accuracy during training, mean over the numbers of pairs", "task", None))
        if (found := _over_steps(rows, kind, name))]
    if panels:
        _figure(folder / "curves.png", panels, arms, "step")
        pictures.append(("curves.png", "Curves over training steps: the mean of the seeds, shaded from the least to "
                                       "the most."))
    tests = _over_pairs(results)
    if tests:
        panels = [(f"accuracy at {length:,} tokens", found) for length, found in sorted(tests.items())]
        _figure(folder / "accuracy.png", panels, arms, "pairs", scale="log")
        pictures.append(("accuracy.png", "Accuracy of the finished models by the number of pairs: the mean of the "
                                         "seeds, shaded from the least to the most."))
    return pictures


def _over_steps(rows: dict[tuple[str, int], list[dict[str, Any]]], kind: str,
                name: str | None) -> dict[str, Points]:
    """{arm: points} of rows of a kind. name: the field; None: the one that ends with /mean."""
    found: dict[str, Points] = defaultdict(lambda: defaultdict(list))
    for (arm, _), its_rows in rows.items():
        for row in its_rows:
            value = row.get(name or next((key for key in row if key.endswith("/mean")), ""))
            if row["kind"] == kind and isinstance(value, (int, float)):
                found[arm][row["step"]].append(value)
    return found


def _over_pairs(results: Results) -> dict[int, dict[str, Points]]:
    found: dict[int, dict[str, Points]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for arm, seeds in results.items():
        for measures in seeds.values():
            for name, value in measures.items():
                if match := _TEST.fullmatch(name):
                    found[int(match[1])][arm][int(match[2])].append(value)
    return found


def _figure(path: Path, panels: list[tuple[str, dict[str, Points]]], arms: list[str], label: str,
            scale: str = "linear") -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels) + 1.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, arm in enumerate(arms):
            if not found.get(arm):
                continue
            x = sorted(found[arm])
            colour = COLOURS[number % len(COLOURS)]
            style = STYLES[number // len(COLOURS) % len(STYLES)]
            axes.plot(x, [interval(found[arm][at]).mean for at in x], style, color=colour, label=arm, lw=1.4,
                      marker="o" if len(x) < 8 else None, ms=3)
            axes.fill_between(x, [min(found[arm][at]) for at in x], [max(found[arm][at]) for at in x], color=colour,
                              alpha=0.15, lw=0)
        axes.set(xlabel=label, xscale=scale)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        if scale == "log":
            ticks = sorted({x for points in found.values() for x in points})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
    handles = {text: handle for axes in figure.axes
               for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
