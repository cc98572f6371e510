"""The layers of an exported model: what each one did with a batch, and other caches in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from hola_megatron.layers.given_score import given_score
from hola_megatron.layers.inspection import ORACLE, LayerFacts
from hola_megatron.layers.registry import expand
from hola_megatron.study.memory.losses import token_losses
from hola_megatron.study.memory.places import oracle_scores

Layer = tuple[Any, Any, Any]  # kind, inspection module, mixer


def layers_of(model: Any) -> list[Layer]:
    """(kind, its inspection module or None, mixer) of every layer; nothing for a model that is not ours."""
    pattern = getattr(model.config, "layer_pattern", None)
    if pattern is None:
        return []
    kinds = expand(pattern, model.config.num_hidden_layers)
    return [(kind, kind.inspection(), layer.mixer)
            for kind, layer in zip(kinds, model.model.layers, strict=True)]


def local_start(layers: Sequence[Layer]) -> Callable[[int], int]:
    """position -> the first token that a layer reads exactly without slots, of the layer that reads the most.

    Layers that read all tokens count only where there are no others. Without any, the token after the position.
    """
    known = [layer for layer in layers if layer[1]]
    chosen = [layer for layer in known if not layer[0].memory_grows] or known

    def first(position: int) -> int:
        return min((module.local_start(mixer, position) for _, module, mixer in chosen), default=position + 1)
    return first


@torch.no_grad()
def facts(model: Any, layers: Sequence[Layer], tokens: np.ndarray, edges: Sequence[int]) -> list[LayerFacts | None]:
    """What each layer did with these windows [R, T + 1]; None for a kind without an inspection."""
    inputs: dict[int, torch.Tensor] = {}
    handles = [mixer.register_forward_pre_hook(lambda _, given, number=number: inputs.__setitem__(number, given[0]))
               for number, (_, _, mixer) in enumerate(layers)]
    try:
        model.model(torch.from_numpy(tokens[:, :-1]).to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [None if module is None else module.facts(mixer, inputs[number], edges, kind.exported().memory())
            for number, (kind, module, mixer) in enumerate(layers)]


def swap_names(layers: Sequence[Layer]) -> list[str]:
    """Names of other caches that the layers can have."""
    return list(dict.fromkeys(name for _, module, mixer in layers if module for name in module.swaps(mixer)))


def swapped_losses(model: Any, layers: Sequence[Layer], tokens: np.ndarray, name: str, batch: int) -> np.ndarray:
    """`token_losses` with another cache in every layer that has one."""
    found, start = [], local_start(layers)
    with _swapped(layers, name):
        for first in range(0, len(tokens), batch):  # the scores belong to the rows of one call
            rows = tokens[first: first + batch]
            with _given(rows, start, model.device) if name == ORACLE else nullcontext():
                found.append(token_losses(model, rows, batch))
    return np.concatenate(found)


def _given(rows: np.ndarray, start: Callable[[int], int], device: torch.device) -> AbstractContextManager[None]:
    return given_score(torch.from_numpy(oracle_scores(rows, start)).to(device))


@contextmanager
def _swapped(layers: Sequence[Layer], name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for _, module, mixer in layers:
            if module and name in (options := module.swaps(mixer)):
                stack.enter_context(module.swapped(mixer, options[name]))
        yield
