"""Inputs that break things: slow and fast decay, beta near 1, heads without decay, packed oddities."""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("q", "k", "v", "log_decay", "beta", "gamma_q", "gamma_k", "gate", "sink")


def make_inputs(batch: int, length: int, *, heads: int = 2, key: int = 16, value: int = 16, decay: str = "slow",
                dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of hola_attention with gradients on; decay "slow" (alpha near 1), "fast" or "none"."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rate = {"slow": 0.003, "fast": 2.0, "none": 0.0}[decay]
    beta = torch.sigmoid(normal(batch, length, heads) * 2 + 1)
    beta[:, ::7] = 0.999
    log_decay = -rate * torch.rand(batch, length, heads, generator=g, dtype=torch.float64)
    log_decay[..., 0] = 0.0
    made = {
        "q": normal(batch, length, heads, key), "k": normal(batch, length, heads, key) * 2,
        "v": normal(batch, length, heads, value), "log_decay": log_decay, "beta": beta,
        "gamma_q": 1 + 0.3 * normal(key), "gamma_k": 1 + 0.3 * normal(key), "gate": normal(heads),
        "sink": normal(heads),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in made.items()}


def gradients(output: Tensor, inputs: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the output, by input name."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = {name: x for name, x in inputs.items() if x.requires_grad}
    found = torch.autograd.grad((output * weight.to(output)).sum(), list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(x) if d is None else d for (name, x), d in zip(wanted.items(), found, strict=True)}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected; NaN never passes a comparison."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
