"""Initial values shared by layer kinds: each function draws one whole logical tensor from its own generator.

Args of all: shape of the tensor, torch.Generator, ModelConfig. Returns: a float32 tensor on the CPU. torch is imported
inside, since plans run without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from hola_megatron.layers.recipe_view import ModelConfig


def normal(shape: tuple[int, ...], generator: torch.Generator, model: ModelConfig) -> torch.Tensor:
    """N(0, init_std^2)."""
    import torch

    return torch.randn(shape, generator=generator) * model.init_std


def ones(shape: tuple[int, ...], generator: torch.Generator, model: ModelConfig) -> torch.Tensor:
    """All ones."""
    import torch

    return torch.ones(shape)


def zeros(shape: tuple[int, ...], generator: torch.Generator, model: ModelConfig) -> torch.Tensor:
    """All zeros."""
    import torch

    return torch.zeros(shape)

