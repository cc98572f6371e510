"""Pictures of the memory report, as PNG in data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from hola_megatron.layers.inspection import LayerFacts
from hola_megatron.study.memory.make import Numbers
from hola_megatron.study.memory.places import NAMES, Mean

BLUE, ORANGE, GREEN, GREY = "#1f77b4", "#ff7f0e", "#2ca02c", "#7f7f7f"
PARTS = {"slots": BLUE, "local part": ORANGE, "sink": GREY}


def _picture(draw: Callable[[Any], None], width: float = 7.5, height: float = 3.4) -> str:
    """A data URL of what `draw` puts on the axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, dpi=100, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def offsets(found: Numbers) -> str:
    """Gain by place in the block."""
    def draw(axes: Any) -> None:
        _with_errors(axes, [(low + high - 1) / 2 for low, high, _ in found.gain["by_offset"]],
                     [mean for _, _, mean in found.gain["by_offset"]])
        axes.set(xlabel="token of the block" if found.block else "token of the window", ylabel=_label(found))
    return _picture(draw)


def distances(found: Numbers) -> str:
    """Gain by distance to the last occurrence of the coming bigram, and where it never occurred."""
    never = found.gain["by_category"][NAMES[0]]
    rows = [(f"{low}" if high == low + 1 else f"{low} to {high - 1}" if high < 1 << 40 else f"{low} on", mean)
            for low, high, mean in found.gain["by_distance"]]
    rows += [("never", never)] if never.count else []
    return _picture(lambda axes: _bars(axes, rows, _label(found)))


def swaps(found: Numbers) -> str:
    """What another cache costs, over all tokens."""
    rows = [(name, means["all"]) for name, means in found.swaps.items()]
    return _picture(lambda axes: _bars(axes, rows, "loss more than as trained, nats"), height=3.8)


def shares(found: Numbers) -> str:
    """Where the softmax of each layer looks."""
    def draw(axes: Any) -> None:
        layers = [(number, facts.shares) for number, facts in _numbered(found) if facts.shares]
        below = [0.0] * len(layers)
        for part, colour in PARTS.items():
            heights = [its[part] for _, its in layers]
            axes.bar([number for number, _ in layers], heights, bottom=below, color=colour, label=part)
            below = [a + b for a, b in zip(below, heights, strict=True)]
        _by_layer(axes, found, "share of the softmax")
        axes.set(ylim=(0, 1))
        axes.figure.legend(loc="outside right center", fontsize=8)
    return _picture(draw)


def gates(found: Numbers) -> str:
    def draw(axes: Any) -> None:
        for number, facts in _numbered(found):
            for gate in facts.gates or ():
                axes.plot(number, gate, "o", color=BLUE, ms=4, alpha=0.7)
        _by_layer(axes, found, "weight of the exact part")
    return _picture(draw, height=3.0)


def curves(found: Numbers, values: Callable[[LayerFacts], Sequence[float] | None], label: str) -> str:
    """One line a layer over positions, from dark (first) to light."""
    def draw(axes: Any) -> None:
        from matplotlib import colormaps

        layers = [(number, series) for number, facts in _numbered(found) if (series := values(facts)) is not None]
        for place, (number, series) in enumerate(layers):
            colour = colormaps["viridis"](0.9 * place / max(1, len(layers) - 1))
            axes.plot(found.edges, series, color=colour, lw=1.2, label=f"layer {number}")
        axes.set(xlabel="token of the window", ylabel=label)
        axes.figure.legend(loc="outside right center", fontsize=7)
    return _picture(draw)


def ages(found: Numbers) -> str:
    def draw(axes: Any) -> None:
        layers = [(number, facts.ages) for number, facts in _numbered(found) if facts.ages]
        axes.boxplot([its for _, its in layers], positions=[number for number, _ in layers], whis=(5, 95),
                     showfliers=False)
        _by_layer(axes, found, "age, tokens")
    return _picture(draw, height=3.0)


def _numbered(found: Numbers) -> list[tuple[int, LayerFacts]]:
    return [(number, facts) for number, facts in enumerate(found.layers, 1) if facts is not None]


def _by_layer(axes: Any, found: Numbers, label: str) -> None:
    numbers = range(1, len(found.layers) + 1)
    axes.set(xlabel="layer", ylabel=label, xlim=(0.4, len(numbers) + 0.6))
    axes.set_xticks(numbers, [str(number) for number in numbers])


def _label(found: Numbers) -> str:
    return "loss, nats a token" if found.baseline is None else "gain, nats a token"


def _with_errors(axes: Any, x: Sequence[float], means: Sequence[Mean]) -> None:
    axes.errorbar(x, [m.mean for m in means], [2 * (m.error or 0) for m in means], fmt="o-", color=BLUE, ms=3, lw=1.2,
                  capsize=2)
    axes.axhline(0, color=GREY, lw=0.8)


def _bars(axes: Any, rows: Sequence[tuple[str, Mean]], label: str) -> None:
    places = range(len(rows))
    axes.bar(places, [mean.mean or 0 for _, mean in rows], yerr=[2 * (mean.error or 0) for _, mean in rows],
             color=BLUE, capsize=2, error_kw={"lw": 0.9})
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set_xticks(places, [name for name, _ in rows], rotation=30, ha="right", fontsize=8)
    axes.set(ylabel=label)
