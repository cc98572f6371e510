"""Which tokens are kept: routing scores, and the threshold that keeps a wanted share of them (HAM, arXiv 2603.22325).

A token is kept by a head when its score reaches the layer's threshold. The cosine score needs no parameters. The
learned one is trained through the read: `log_weight` of `kept_attention` is the logarithm of the score, added to the
logits of kept tokens, so that its gradient is exact.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hola_kernels.errors import KernelError


def cosine_score(v: Tensor, retrieved: Tensor) -> Tensor:
    """How far the memory's answer points away from a token's value: 1 - cos(v, P'k), from 0 to 2.

    v, retrieved [..., V], retrieved = v - e with the residual e of the delta rule. Returns [...] float32 (float64 of
    float64); 1 where either is zero.
    """
    compute = torch.float64 if torch.float64 in (v.dtype, retrieved.dtype) else torch.float32
    return 1 - F.cosine_similarity(v.to(compute), retrieved.to(compute), dim=-1)


def learned_logit(inner: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The logit of a learned score, per head w . SiLU(u) + b.

    inner [..., H R]: R numbers u a head, a linear of the layer's input; weight [H, R], bias [H]. Returns [..., H]
    float32 (float64 of float64).
    """
    compute = torch.float64 if inner.dtype == torch.float64 else torch.float32
    u = F.silu(inner.unflatten(-1, weight.shape).to(compute))
    return (u * weight.to(compute)).sum(-1) + bias.to(compute)


class ShareThreshold(nn.Module):
    """A layer's threshold tau, moved until the wanted share of tokens reaches it: tau += rate * (share - target).

    threshold, updates: buffers [1] float32, part of checkpoints: tau, and how often `update` was called. The first
    `freeze` updates leave tau as it is. `counted` is no part of checkpoints.

    Args:
        target: the wanted share, 0 to 1.
        start: tau before the first update.
        rate: how far an update moves tau for a share that is off by 1.
        freeze: updates that do not move it.

    Raises:
        KernelError: a setting that is not possible.
    """

    def __init__(self, target: float, *, start: float = 0.5, rate: float = 0.01, freeze: int = 0):
        super().__init__()
        for name, x, most in (("target", target, 1.0), ("start", start, math.inf), ("rate", rate, math.inf)):
            if not math.isfinite(x) or not (name == "start" or 0 <= x <= most):
                raise KernelError(f"{name} = {x!r} must be a finite number{'' if name == 'start' else ' of at least 0'}"
                                  f"{' and at most 1' if name == 'target' else ''}")
        self.target, self.start, self.rate, self.freeze = target, start, rate, freeze
        self.register_buffer("threshold", torch.tensor([start], dtype=torch.float32))
        self.register_buffer("updates", torch.zeros(1, dtype=torch.float32))
        self._counted: Tensor | None = None  # no buffer: transformers leaves those that are not stored unset

    @property
    def counted(self) -> Tensor:
        """[2] int64: kept and all (tokens x heads) since the last update."""
        if self._counted is None or self._counted.device != self.threshold.device:
            self._counted = torch.zeros(2, dtype=torch.int64, device=self.threshold.device)
        return self._counted

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As before the first update."""
        self.threshold.fill_(self.start)
        self.updates.zero_()
        self._counted = None

    def keep(self, score: Tensor) -> Tensor:
        """Which tokens reach the threshold, bool like score [B, T, H]; NaN does not."""
        return score.detach() >= self.threshold.to(score.dtype)

    @torch.no_grad()
    def count(self, keep: Tensor) -> None:
        """Add the tokens of keep [B, T, H] to `counted`."""
        counted = self.counted
        counted[0] += keep.sum()
        counted[1] += keep.numel()

    @torch.no_grad()
    def update(self, counted: Tensor | None = None) -> None:
        """One training step, whose counts are `counted` [2] (its own by default): where several ranks train, the sums
        over them, the same on every rank. Starts to count anew. Does not wait for the device."""
        kept, every = (self.counted if counted is None else counted).double()
        moving = (self.updates >= self.freeze) & (every > 0)
        step = self.rate * (kept / every.clamp_min(1) - self.target)
        self.threshold += torch.where(moving, step, 0.0).to(self.threshold.dtype)
        self.updates += 1
        self.counted.zero_()
