"""All numbers of a memory report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hola_megatron.layers.inspection import LayerFacts
from hola_megatron.study.memory.layers import facts, layers_of, local_start, swap_names, swapped_losses
from hola_megatron.study.memory.losses import token_losses
from hola_megatron.study.memory.places import (
    NAMES,
    Mean,
    by_category,
    by_distance,
    by_offset,
    categories,
    last_occurrences,
)

EDGES = 16  # positions at which states are looked at
WITHOUT_SLOTS = "0 slots"


@dataclass(frozen=True)
class Numbers:
    """The numbers of a report. Gains and differences in nats a token.

    loss: of the model. second: of the baseline, and `baseline` what it is; both None without one.
    gain: by_offset, by_distance and by_category of (baseline's loss - model's loss); the loss itself without baseline.
    block: tokens of a block; None for models without one, whose places are positions in the window.
    swaps: name -> (loss with that cache - loss), over all tokens and by category.
    layers: facts of each layer, with its kind; None for kinds without an inspection. edges: the positions of theirs.
    """

    windows: int
    length: int
    loss: Mean
    baseline: str | None
    second: Mean | None
    block: int | None
    gain: dict[str, Any]
    share: dict[str, float]
    swaps: dict[str, dict[str, Mean]]
    kinds: list[str]
    layers: list[LayerFacts | None]
    edges: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; kept tokens as their number."""
        found = asdict(self)
        for layer in found["layers"]:
            if layer is not None and layer["ages"] is not None:
                ages = layer.pop("ages")
                layer["age_quantiles"] = np.quantile(ages, [0.1, 0.5, 0.9]).tolist() if ages else None
                layer["kept"] = sum(count > 0 for count in layer["kept"])
        return found


def numbers(model: Any, tokens: np.ndarray, *, batch: int, second: tuple[str, Any] | None = None,
            tell: Callable[[str], None] = lambda _: None) -> Numbers:
    """Measure a model on windows [R, T + 1].

    batch: windows at a time. second: name and model of the baseline; None: the same model without slots, where it has
    slots. tell: called with what is being done.
    """
    layers = layers_of(model)
    start, names = local_start(layers), swap_names(layers)
    length = tokens.shape[1] - 1
    tell("losses")
    losses = token_losses(model, tokens, batch)
    last = last_occurrences(tokens)
    kinds = categories(last, start)
    swapped: dict[str, np.ndarray] = {}
    for name in names:
        tell(f"cache: {name}")
        swapped[name] = swapped_losses(model, layers, tokens, name, batch)
    baseline, other = None, None
    if second is not None:
        tell("losses of the second model")
        baseline, other = second[0], token_losses(second[1], tokens, batch)
    elif WITHOUT_SLOTS in swapped:
        baseline, other = "the same model without slots", swapped[WITHOUT_SLOTS]
    gain = losses if other is None else other - losses
    # the first token of the second block reads itself alone; where every token does, there are no blocks
    block = next((p for p in range(2, length) if start(p) == p), None) if start(1) == 0 else None
    tell("layers")
    edges = sorted({max(1, length * i // EDGES) for i in range(1, EDGES + 1)})
    return Numbers(
        windows=len(tokens), length=length, loss=Mean.of(losses.ravel()), baseline=baseline,
        second=None if other is None else Mean.of(other.ravel()), block=block,
        gain={"by_offset": by_offset(gain, block or length), "by_distance": by_distance(gain, last),
              "by_category": by_category(gain, kinds)},
        share={name: float((kinds == number).mean()) for number, name in enumerate(NAMES)},
        swaps={name: {"all": Mean.of((values - losses).ravel()), **by_category(values - losses, kinds)}
               for name, values in swapped.items()},
        kinds=[kind.title for kind, _, _ in layers], layers=facts(model, layers, tokens[:batch], edges), edges=edges)
