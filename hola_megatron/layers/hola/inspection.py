"""What state and exact cache of a HOLA layer did with a batch (layers/inspection.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from hola_kernels import read_mass
from hola_megatron.layers.given_score import SCORE
from hola_megatron.layers.inspection import ORACLE, LayerFacts, between, counted, recorded_reads, replaced, state_norms

SCORES, SLOTS = ("betae", "recency", "random", "e", "cosine"), (0, 16, 64, 256)
STATELESS_SCORES = ("recency", "random", "betav")


def facts(mixer: Any, hidden_BTD: Tensor, edges: Sequence[int], memory: Any) -> LayerFacts:
    read, length = recorded_read(mixer, hidden_BTD), hidden_BTD.shape[1]
    mass = read_mass(**read).flatten(0, 2).double().mean(0).tolist()
    norms = state_norms(mixer, hidden_BTD, edges, memory)
    held = memory.state.cache_position  # [B, H, w]
    gates = mixer.gate.sigmoid().tolist() if hasattr(mixer, "gate") else None  # else of each token, or none
    ages = (length - held[held >= 0]).tolist()
    return LayerFacts(
        local=_local(mixer.options), heads=mixer.num_value_heads,
        shares=dict(zip(("slots", "local part", "sink"), mass, strict=True)), gates=gates,
        norms=norms if memory.state.recurrent else None,
        scores=between(read["score"], edges), kept=counted(held[0], length) if mixer.options.slots else None,
        ages=ages if mixer.options.slots else None)


def recorded_read(mixer: Any, hidden_BTD: Tensor) -> dict[str, Any]:
    """The keywords with which the layer reads its cache, for a call with this input."""
    with recorded_reads() as reads, replaced(mixer, "backend", "torch"):
        mixer(hidden_BTD, None, None)
    (read,) = reads
    return read


def _local(options: Any) -> str:
    return {"block": f"its block of {options.block} tokens up to itself",
            "window": f"a sliding window of {options.window} tokens", "none": "itself alone"}[options.local]


def local_start(mixer: Any, position: int) -> int:
    options = mixer.options
    if options.local == "block":
        return position // options.block * options.block
    return max(0, position + 1 - (options.window or 1))


def swaps(mixer: Any) -> dict[str, Any]:
    """Other scores and numbers of slots; nothing for a layer without slots."""
    options = mixer.options
    if not options.slots:
        return {}
    scores = STATELESS_SCORES if mixer.rule == "none" else SCORES
    found = {f"score {score}": replace(options, score=score) for score in dict.fromkeys((*scores, options.score))}
    found |= {f"{slots} slots": replace(options, slots=slots) for slots in SLOTS}
    return {**found, ORACLE: replace(options, score=SCORE)}


def swapped(mixer: Any, options: Any) -> AbstractContextManager[None]:
    return replaced(mixer, "options", options)
