"""loss.png: training and validation loss, drawn from metrics.jsonl.

During a run it is drawn by a separate process at the lowest priority, since drawing a long run takes seconds of Python.

    python -m hola_megatron.log.plot RUN TITLE
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hola_megatron
from hola_megatron.log.metrics import read_rows
from hola_megatron.log.reports import Reports

KIND = "loss.png"
WAIT_SECONDS = 2.0


def plot_loss(folder: Path, title: str) -> Path:
    """Draw training and validation loss over steps; returns the path of the image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(folder / "metrics.jsonl")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kinds = sorted({row["kind"] for row in rows if row["kind"].partition("/")[0] in ("train", "valid")})
    for kind in kinds:
        style = {"lw": 1.2} if kind == "train" else {"lw": 0, "marker": "o", "ms": 5}
        points = [(row["step"], row["loss"]) for row in rows if row["kind"] == kind and row["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=kind, **style)
    axes.set(xlabel="step", ylabel="loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    path = folder / "loss.png"
    figure.savefig(folder / "loss.png.tmp", dpi=110, format="png")
    os.replace(folder / "loss.png.tmp", path)
    return path


class LossPlot:
    """Draws a run's loss.png during the run and at its end. A failure is printed once."""

    def __init__(self, folder: Path, title: str, reports: Reports):
        self.folder, self.title, self.reports = folder, title, reports
        self._drawing: subprocess.Popen | None = None

    def begin(self) -> None:
        """Draw in another process; nothing while the last one is running."""
        if not self._drawing or self._drawing.poll() is not None:
            self.reports.attempt(KIND, self._begin)

    def end(self) -> None:
        """Draw in this process, after the last step."""
        self._stop()
        self.reports.attempt(KIND, lambda: plot_loss(self.folder, self.title))

    def close(self) -> None:
        """Wait briefly for a running process, then stop it."""
        if self._drawing:
            try:
                self._drawing.wait(WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                self._stop()
            else:
                self.reports.attempt(KIND, self._look)

    def _begin(self) -> None:
        self._look()
        package = str(Path(hola_megatron.__file__).parents[1])
        paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._drawing = subprocess.Popen(
            [sys.executable, "-m", "hola_megatron.log.plot", str(self.folder), self.title],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths})

    def _look(self) -> None:
        """Raise the error of the last process, if it failed. Each kind of report is tried until it fails once."""
        drawing, self._drawing = self._drawing, None
        if drawing and drawing.stderr:
            lines = drawing.stderr.read().decode(errors="replace").strip().splitlines()
            drawing.stderr.close()
            if drawing.returncode:
                raise RuntimeError(lines[-1] if lines else f"the drawing process ended with {drawing.returncode}")

    def _stop(self) -> None:
        if self._drawing and self._drawing.poll() is None:
            self._drawing.kill()
            self._drawing.wait(WAIT_SECONDS)
        self._drawing = None


if __name__ == "__main__":
    os.nice(19)
    plot_loss(Path(sys.argv[1]), sys.argv[2])
