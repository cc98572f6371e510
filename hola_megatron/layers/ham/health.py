"""Statistics of a HAM layer's memories over one validation batch.

kept: the share of (tokens x heads) above the threshold; the threshold; the mean of the two gates; quantiles of the
routing score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hola_kernels import PackedDocuments
from hola_megatron.parallel.context import ContextParallel

if TYPE_CHECKING:
    from hola_megatron.layers.ham.mixer import HamMixer

FIELDS = ("kept", "threshold", "gate_state", "gate_exact", "score_median", "score_p99")


@torch.no_grad()
def measure(mixer: HamMixer, tokens: dict[str, Tensor], cu_seqlens: PackedDocuments | None,
            cp: ContextParallel | None = None) -> dict[str, float]:
    """The FIELDS of one layer. tokens: the arguments of `ham_attention` by name."""
    _, keep, score = mixer.read(tokens, cu_seqlens)
    gates = tokens["mix"].float().sigmoid().flatten(0, 2).mean(0)
    values = [keep.float().mean(), mixer.controller.threshold[0], *gates, score.float().median(),
              score.float().flatten().kthvalue(max(1, round(0.99 * score.numel()))).values]
    return dict(zip(FIELDS, torch.stack(values).tolist(), strict=True))
