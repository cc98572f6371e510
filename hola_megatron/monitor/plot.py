"""loss.png: the run at a glance, redrawn from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from hola_megatron.monitor.metrics import read_rows


def plot_loss(folder: Path, title: str) -> Path:
    """Draw training and validation loss over steps; returns the picture's path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(folder / "metrics.jsonl")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, style in (("train", {"lw": 1.2}), ("valid", {"lw": 0, "marker": "o", "ms": 5})):
        points = [(row["step"], row["loss"]) for row in rows if row["kind"] == kind and row["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=kind, **style)
    axes.set(xlabel="step", ylabel="loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=110)
    return path
