"""RMSNorm for Megatron layer specs that runs on any device and under sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hola_kernels.rms_norm import rms_norm, rms_norm_with_residual
from hola_megatron.model.config import HolaTransformerConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the statistics are float32.

    Under sequence parallelism each tensor rank sees part of the tokens: the tag makes
    Megatron add the weight's gradients up over tensor ranks.
    """

    def __init__(self, config: HolaTransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps, self.backend = eps, config.recipe_model.backend

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x=x, weight=self.weight, eps=self.eps, backend=self.backend)


class RMSNormWithResidual(RMSNorm):
    """Returns (normed, x): Megatron's layer takes the second as its residual, whose gradient the norm then adds."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_with_residual(x=x, weight=self.weight, eps=self.eps, backend=self.backend)
