"""Statistics of a HOLA layer's exact cache over one validation batch.

The softmax mass on cached tokens, local part and sink; the gate; quantiles of the score that ranks tokens
(`model.cache.score`; of a learned one, its logits after softplus), of the decay, and of the cached tokens' age (in
tokens, at the start of the block).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from hola_kernels import PackedDocuments, cache_ages, gated_delta_rule, read_mass
from hola_kernels.stages import (
    CacheOptions,
    gated_delta_residual,
    rank_tokens,
    rank_without_state,
    segments_of,
    with_positions,
)
from hola_megatron.parallel.context import ContextParallel, scores_and_memory, split_read, tokens_at_positions

if TYPE_CHECKING:
    from hola_megatron.layers.hola.mixer import HolaMixer

FIELDS = ("cached", "block", "sink", "gate", "score_median", "score_p99", "decay_median", "decay_p01",
          "age_median", "age_p90")


@torch.no_grad()
def measure(mixer: HolaMixer, tokens: dict[str, Tensor], cu_seqlens: Tensor | PackedDocuments | None,
            cp: ContextParallel | None = None) -> dict[str, float]:
    """The FIELDS of one layer, NaN where a field does not apply.

    tokens: q, k, v, log_decay, beta, gate and route of hola_attention, the last with a learned score alone; without a
    state q, k, v and route of exact_attention.
    """
    tokens, arguments, options, backend = dict(tokens), mixer.read_parameters(), mixer.options, mixer.model.backend
    gate, route = tokens.pop("gate", None), tokens.pop("route", None)
    gate = gate.sigmoid().mean() if gate is not None and options.merge == "add" else float("nan")
    both = (tokens["q"], tokens["k"], arguments.pop("gamma_q"), arguments.pop("gamma_k"), options)
    if cp is None:
        bounds = segments_of(tokens["q"], cu_seqlens)
        arguments |= with_positions(*both, bounds, torch.zeros_like(bounds[1:]))
    else:
        arguments |= tokens_at_positions(*both, cp)
    read = {"q": arguments.pop("q"), "k": arguments.pop("k"), "v": tokens["v"]}
    if cp is None:
        read["score"] = _score(tokens, route, options, cu_seqlens, backend)
        reads = [(read, cu_seqlens, None)]
    else:
        read["score"], memory = scores_and_memory(**tokens, read_k=read["k"], cp=cp, options=options, route=route,
                                                  backend=backend)
        reads = split_read(read, memory, cp.shard)
    score = read["score"]
    mass = torch.cat([read_mass(**inputs, cu_seqlens=bounds, memory=memory, **{**options.of_the_read, **arguments})
                      for inputs, bounds, memory in reads], 1)
    shares = mass.flatten(0, 2).mean(0).tolist()
    sizes = {name: getattr(options, name) for name in ("block", "slots", "local", "window")}
    ages = torch.cat([cache_ages(score=inputs["score"], cu_seqlens=bounds, memory=memory, **sizes)
                      for inputs, bounds, memory in reads])
    decay = tokens.get("log_decay", score[:0]).exp().flatten().float()
    values = [*shares, float(gate), float(score.median()), _quantile(score, 0.99), float(decay.median()),
              _quantile(decay, 0.01), _quantile(ages, 0.5), _quantile(ages, 0.9)]
    if cp is not None:
        values = _mean_over_ranks(values, cp, score.device)
    return dict(zip(FIELDS, values, strict=True))


def _score(tokens: dict[str, Tensor], route: Tensor | None, options: CacheOptions,
           cu_seqlens: Tensor | PackedDocuments | None, backend: str) -> Tensor:
    """What the cache ranks tokens by, [B, T, H]."""
    if "beta" not in tokens:
        bounds = segments_of(tokens["v"], cu_seqlens)
        return rank_without_state(tokens["v"], options, bounds, torch.zeros_like(bounds[1:]), route=route)
    _, written, _ = gated_delta_rule(**tokens, cu_seqlens=cu_seqlens, backend=backend)
    bounds, rule = segments_of(written, cu_seqlens), {name: x for name, x in tokens.items() if name != "q"}
    residual = None
    if options.score == "cosine":
        residual = gated_delta_residual(**rule, cu_seqlens=cu_seqlens, backend=backend)
    return rank_tokens(options.score, written, tokens["v"], tokens["beta"], bounds, torch.zeros_like(bounds[1:]),
                       residual=residual, route=route)


def _mean_over_ranks(values: list[float], cp: ContextParallel, device: torch.device) -> list[float]:
    """Mean over the ranks whose value is not NaN (the first rank may have no cached token)."""
    mine = torch.tensor(values, dtype=torch.float32, device=device)
    sums = torch.stack([mine.nan_to_num(), (~mine.isnan()).float()])
    dist.all_reduce(sums, group=cp.group)
    return (sums[0] / sums[1]).tolist()


def _quantile(x: Tensor, q: float) -> float:
    """The q-quantile of all elements; NaN for an empty tensor."""
    flat = x.flatten().float()
    if not flat.numel():
        return float("nan")
    return float(flat.kthvalue(max(1, round(q * flat.numel()))).values)
