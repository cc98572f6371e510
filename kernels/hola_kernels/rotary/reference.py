"""The definition of `positions`, with tables of one cosine and sine for a token and a pair of channels.

Computed in float32, of float64 numbers in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels import positions


def angles(position_S: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, K / 2] in `dtype` of tokens at these positions; width: K."""
    cos, sin = positions.angles(position_S, width, base, dtype)
    return cos.squeeze(1), sin.squeeze(1)


def rotary_reference(x_BSHK: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> Tensor:
    """x rotated by the angles of its tokens, in x's dtype; F = K / 2."""
    return positions.rotated(x_BSHK, cos_SF[:, None], sin_SF[:, None])
