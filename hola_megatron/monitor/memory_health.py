"""What the exact memory does: shown at every validation, because a cache nobody reads is a silent failure.

Per HOLA layer, over one validation batch: the share of the read's softmax on cached tokens, own block and sink; the
gate; quantiles of the write score, of the decay, and of the cached tokens' age (in tokens, when their block begins).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from hola_kernels import cache_ages, gated_delta_rule, read_mass
from hola_megatron.model.mixer import DeltaMixer
from hola_megatron.parallel.context import OverRanks, scores_and_memory, split_read
from hola_megatron.parallel.groups import Layout

FIELDS = ("cached", "block", "sink", "gate", "score_median", "score_p99", "decay_median", "decay_p01",
          "age_median", "age_p90")


@contextmanager
def watch(model_chunks: list[nn.Module]) -> Iterator[dict[int, dict[str, float]]]:
    """While open, every forward pass fills {layer: {field: value}} from this rank's heads (`of_all_ranks` joins them).

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


def of_all_ranks(found: dict[int, dict[str, float]], layout: Layout) -> dict[int, dict[str, float]]:
    """All layers and heads of the model from what each rank saw: the mean over tensor ranks, which hold as many heads
    each, then the layers of all pipeline stages. A collective over both.
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
    score, shares, ages = read["score"], [float("nan")] * 3, read["score"].new_empty(0)
    if ranks == "betae":
        mass = torch.cat([read_mass(**piece, cu_seqlens=piece_cuts, memory=memory, **arguments)
                          for piece, piece_cuts, memory in pieces], 1)
        shares = mass.flatten(0, 2).mean(0).tolist()
        sizes = {name: arguments[name] for name in ("block", "slots")}
        ages = torch.cat([cache_ages(score=piece["score"], cu_seqlens=piece_cuts, memory=memory, **sizes)
                          for piece, piece_cuts, memory in pieces])
    decay = tokens["log_decay"].exp().flatten().float()
    values = [*shares, float(gate), float(score.median()), _quantile(score, 0.99), float(decay.median()),
              _quantile(decay, 0.01), _quantile(ages, 0.5), _quantile(ages, 0.9)]
    if over is not None:
        values = _mean_over_ranks(values, over, score.device)
    return dict(zip(FIELDS, values, strict=True))


def _mean_over_ranks(values: list[float], over: OverRanks, device: torch.device) -> list[float]:
    """Of the ranks that have a value: the first may have no cached token."""
    mine = torch.tensor(values, dtype=torch.float32, device=device)
    sums = torch.stack([mine.nan_to_num(), (~mine.isnan()).float()])
    dist.all_reduce(sums, group=over.group)
    return (sums[0] / sums[1]).tolist()


def _quantile(x: Tensor, q: float) -> float:
    """NaN of nothing."""
    flat = x.flatten().float()
    if not flat.numel():
        return float("nan")
    return float(flat.kthvalue(max(1, round(q * flat.numel()))).values)


def panel(found: dict[int, dict[str, float]]) -> str:
    """A table, one line a layer."""
    lines = ["memory  layer " + " ".join(f"{name:>12}" for name in FIELDS)]
    lines += [f"{layer:>13} " + " ".join(f"{values[name]:>12.4f}" for name in FIELDS)
              for layer, values in sorted(found.items())]
    return "\n".join(lines)
