"""What the exact memory does: shown at every validation, because a cache nobody reads is a silent failure.

Per HOLA layer, over one validation batch: the share of the read's softmax on cached tokens,
own block and sink; the gate; quantiles of the write score and of the decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hola_kernels import gated_delta_rule, read_mass
from hola_megatron.model.mixer import DeltaMixer

FIELDS = ("cached", "block", "sink", "gate", "score_median", "score_p99", "decay_median", "decay_p01")


@contextmanager
def watch(model_chunks: list[nn.Module]) -> Iterator[dict[int, dict[str, float]]]:
    """While open, every forward pass fills {layer: {field: value}} from this rank's heads."""
    found: dict[int, dict[str, float]] = {}
    mixers = [m for chunk in model_chunks for m in chunk.modules() if isinstance(m, DeltaMixer) and m.exact_cache]
    for mixer in mixers:
        mixer.observer = lambda mixer, tokens, cuts: found.__setitem__(
            mixer.layer_number, measure(mixer, tokens, cuts))
    try:
        yield found
    finally:
        for mixer in mixers:
            mixer.observer = None


@torch.no_grad()
def measure(mixer: DeltaMixer, tokens: dict[str, Tensor], cuts: Tensor | None) -> dict[str, float]:
    """The fields above for one layer's tokens (arguments of hola_attention)."""
    _, score, _ = gated_delta_rule(**tokens, cu_seqlens=cuts, backend=mixer.model.backend)
    arguments = mixer.cache_arguments()
    gate = arguments.pop("gate").sigmoid().mean()
    ranks = arguments.pop("score")
    mass = None
    if ranks == "betae":
        mass = read_mass(**{n: tokens[n] for n in ("q", "k", "v")}, score=score, cu_seqlens=cuts, **arguments)
    shares = [float("nan")] * 3 if mass is None else mass.flatten(0, 2).mean(0).tolist()
    decay = tokens["log_decay"].exp().flatten().float()
    values = [*shares, float(gate), float(score.median()), _quantile(score, 0.99), float(decay.median()),
              _quantile(decay, 0.01)]
    return dict(zip(FIELDS, values, strict=True))


def _quantile(x: Tensor, q: float) -> float:
    flat = x.flatten().float()
    return float(flat.kthvalue(max(1, round(q * flat.numel()))).values)


def panel(found: dict[int, dict[str, float]]) -> str:
    """A table, one line a layer."""
    lines = ["memory  layer " + " ".join(f"{name:>12}" for name in FIELDS)]
    lines += [f"{layer:>13} " + " ".join(f"{values[name]:>12.4f}" for name in FIELDS)
              for layer, values in sorted(found.items())]
    return "\n".join(lines)
