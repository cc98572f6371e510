"""Start values of a layer's parameters, as Gated DeltaNet has them. All return float32 tensors.

Shared by the modules of this package, by exported models and by the training stack, which gives every logical tensor a
generator of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def draw_children(layer: nn.Module, std: float) -> bool:
    """Start values of a layer's linears, normal with this deviation, and of its other parts by their own
    reset_parameters. False, with nothing drawn, for a layer without memory (device meta)."""
    if layer.o_proj.weight.device.type == "meta":
        return False
    for module in layer.children():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, std)
        else:
            module.reset_parameters()
    return True


def decay_rate(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """A_log: the logarithm of A ~ U(0, 16)."""
    return _uniform(shape, 0.0, 16.0, generator).clamp_min(1e-4).log()


def step_bias(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """dt_bias: the inverse softplus of a step that is log-uniform in [1e-3, 0.1]."""
    dt = _uniform(shape, math.log(1e-3), math.log(0.1), generator).exp().clamp_min(1e-4)
    return dt + torch.log(-torch.expm1(-dt))


def convolution(shape: tuple[int, int], generator: torch.Generator | None = None) -> Tensor:
    """[D, W]: U(-1, 1) / sqrt(W), as torch.nn.Conv1d starts a depthwise convolution."""
    return _uniform(shape, -1.0, 1.0, generator) / math.sqrt(shape[1])


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low
