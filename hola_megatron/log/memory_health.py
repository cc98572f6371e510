"""Statistics of the layers' memories at every validation: a memory that is not used would not show in the loss.

Layer kinds define them (`LayerKind.health`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from hola_megatron.layers.mixer import Mixer
from hola_megatron.parallel.groups import Layout


@contextmanager
def watch(model_chunks: list[nn.Module]) -> Iterator[dict[int, dict[str, float]]]:
    """Inside the context, every forward pass fills {layer: {field: value}}, of this rank's heads (`of_all_ranks`).

    Under context parallelism a value is the mean over the ranks' shards.
    """
    found: dict[int, dict[str, float]] = {}
    mixers = [m for chunk in model_chunks for m in chunk.modules() if isinstance(m, Mixer) and m.kind.health()]
    for mixer in mixers:
        mixer.observer = lambda mixer, tokens, cu_seqlens, cp: found.__setitem__(
            mixer.layer_number, mixer.kind.health().measure(mixer, tokens, cu_seqlens, cp))
    try:
        yield found
    finally:
        for mixer in mixers:
            mixer.observer = None


def of_all_ranks(found: dict[int, dict[str, float]], layout: Layout) -> dict[int, dict[str, float]]:
    """Values of all layers and heads: the mean over tensor ranks, then the layers of all pipeline stages. A collective.
    """
    if layout.tensor > 1:
        shares = _gathered(found, layout.tensor, parallel_state.get_tensor_model_parallel_group())
        found = {layer: {name: sum(share[layer][name] for share in shares) / layout.tensor for name in values}
                 for layer, values in found.items()}
    if layout.pipeline > 1:
        stages = _gathered(found, layout.pipeline, parallel_state.get_pipeline_model_parallel_group())
        found = dict(sorted((layer, values) for stage in stages for layer, values in stage.items()))
    return found


def _gathered(found: dict[int, dict[str, float]], size: int, group: dist.ProcessGroup) -> list[dict]:
    shares: list[dict[int, dict[str, float]]] = [{}] * size
    dist.all_gather_object(shares, found, group=group)
    return shares


def panel(found: dict[int, dict[str, float]]) -> str:
    """A table with one line per layer; a heading before each group of layers with the same fields."""
    lines, heading = [], None
    for layer, values in sorted(found.items()):
        if tuple(values) != heading:
            heading = tuple(values)
            lines.append("memory  layer " + " ".join(f"{name:>12}" for name in heading))
        lines.append(f"{layer:>13} " + " ".join(f"{value:>12.4f}" for value in values.values()))
    return "\n".join(lines)
