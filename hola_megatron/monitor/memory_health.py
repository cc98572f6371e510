"""What the exact memory does: shown at every validation, because a cache nobody reads is a silent failure.

Per HOLA layer, over one validation batch: the share of the read's softmax on cached tokens,
own block and sink; the gate; quantiles of the write score and of the decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hola_kernels import gated_delta_rule, read_mass
from hola_megatron.model.mixer import DeltaMixer
from hola_megatron.parallel.context import OverRanks, scores_and_memory, split_read

FIELDS = ("cached", "block", "sink", "gate", "score_median", "score_p99", "decay_median", "decay_p01")


@contextmanager
def watch(model_chunks: list[nn.Module]) -> Iterator[dict[int, dict[str, float]]]:
    """While open, every forward pass fills {layer: {field: value}} from this rank's heads.

    Where a sequence is cut over ranks, all of them together: the mean of what each finds in its part.
    """
    found: dict[int, dict[str, float]] = {}
    mixers = [m for chunk in model_chunks for m in chunk.modules() if isinstance(m, DeltaMixer) and m.exact_cache]
    for mixer in mixers:
        mixer.observer = lambda mixer, tokens, cuts, over: found.__setitem__(
            mixer.layer_number, measure(mixer, tokens, cuts, over))
    try:
        yield found
    finally:
        for mixer in mixers:
            mixer.observer = None


@torch.no_grad()
def measure(mixer: DeltaMixer, tokens: dict[str, Tensor], cuts: Tensor | None,
            over: OverRanks | None = None) -> dict[str, float]:
    """The fields above for one layer's tokens (arguments of hola_attention)."""
    arguments = mixer.cache_arguments()
    gate = arguments.pop("gate").sigmoid().mean()
    ranks, backend = arguments.pop("score"), mixer.model.backend
    read = {n: tokens[n] for n in ("q", "k", "v")}
    if over is None:
        _, read["score"], _ = gated_delta_rule(**tokens, cu_seqlens=cuts, backend=backend)
        pieces = [(read, cuts, None)]
    else:
        choices = {"block": arguments["block"], "slots": arguments["slots"], "backend": backend}
        read["score"], memory = scores_and_memory(**tokens, over=over, **choices)
        pieces = split_read(read, memory, over.part)
    score, mass = read["score"], None
    if ranks == "betae":
        mass = torch.cat([read_mass(**piece, cu_seqlens=piece_cuts, memory=memory, **arguments)
                          for piece, piece_cuts, memory in pieces], 1)
    shares = [float("nan")] * 3 if mass is None else mass.flatten(0, 2).mean(0).tolist()
    decay = tokens["log_decay"].exp().flatten().float()
    values = [*shares, float(gate), float(score.median()), _quantile(score, 0.99), float(decay.median()),
              _quantile(decay, 0.01)]
    if over is not None:
        mean = torch.tensor(values, dtype=torch.float32, device=score.device)
        dist.all_reduce(mean, group=over.group)
        values = (mean / over.part.ranks).tolist()
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
