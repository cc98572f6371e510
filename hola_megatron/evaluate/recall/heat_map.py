"""Pictures of a task on a grid of lengths and depths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hola_megatron.errors import RecipeError
from hola_megatron.evaluate.suite.results import Outcome


def heat_maps(folder: Path, found: Mapping[str, Sequence[Outcome]]) -> list[Path]:
    """One PNG for every model with outcomes on a grid. Raises RecipeError where a picture cannot be written."""
    made = []
    for number, (name, outcomes) in enumerate(found.items(), 1):
        cells = [cell for outcome in outcomes for cell in outcome.cells or ()]
        if cells:
            plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(name).name)
            made.append(_draw(folder / f"passkey-{number}-{plain}.png", name, cells))
    return made


def _draw(path: Path, name: str, cells: list[dict[str, float]]) -> Path:
    from matplotlib.figure import Figure

    lengths = sorted({int(cell["length"]) for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    grid = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        grid[depths.index(cell["depth"])][lengths.index(int(cell["length"]))] = cell["value"]
    figure = Figure(figsize=(2.5 + 0.7 * len(lengths), 1.8 + 0.35 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                      color="black" if value > 0.6 else "white")
    axes.set(title=f"passkeys found: {name}", xlabel="length (tokens)", ylabel="depth of the key")
    figure.colorbar(image)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise RecipeError(f"--out: {path} cannot be written ({error.strerror}); name a folder elsewhere") from None
    return path
