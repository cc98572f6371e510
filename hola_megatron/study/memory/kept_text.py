"""The text of a window, coloured by how many heads keep each token exactly."""

from __future__ import annotations

from html import escape
from typing import Any

from hola_megatron.study.memory.make import Numbers

MOST_LAYERS = 6  # that are shown


def kept_texts(found: Numbers, tokenizer: Any, ids: list[int]) -> list[tuple[int, str]]:
    """(layer, HTML) of layers with slots, at most MOST_LAYERS evenly spread. ids: the inputs of the first window."""
    layers = [number for number, facts in enumerate(found.layers) if facts is not None and facts.kept is not None]
    if len(layers) > MOST_LAYERS:
        layers = [layers[i * (len(layers) - 1) // (MOST_LAYERS - 1)] for i in range(MOST_LAYERS)]
    pieces = [tokenizer.decode([token]) for token in ids]
    return [(number + 1, _coloured(pieces, found.layers[number].kept, found.layers[number].heads, len(ids)))
            for number in layers]


def _coloured(pieces: list[str], kept: list[int], heads: int, length: int) -> str:
    spans = []
    for position, (piece, count) in enumerate(zip(pieces, kept, strict=True)):
        text = escape(piece) if piece else "&middot;"
        if not count:
            spans.append(text)
            continue
        strength = 0.25 + 0.75 * count / heads
        said = f"kept by {count} of {heads} heads, {length - position} tokens old"
        spans.append(f'<span class="kept" style="background:rgba(255,127,14,{strength:.2f})" title="{said}">{text}'
                     "</span>")
    return "".join(spans)
