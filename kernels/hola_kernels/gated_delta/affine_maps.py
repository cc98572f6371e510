"""Composition of the affine maps that runs of tokens are on a state: S_out = M S_in + E, held as [E | M]."""

from __future__ import annotations

import torch
from torch import Tensor


def compose(maps_NHKW: Tensor) -> Tensor:
    """One map of N that follow each other, as [E | M] [..., N, H, K, V + K] -> [..., H, K, V + K].

    Neighbours are joined two by two, so few products follow each other.
    """
    key_dim = maps_NHKW.shape[-2]
    value_dim = maps_NHKW.shape[-1] - key_dim
    while (count := maps_NHKW.shape[-4]) > 1:
        pairs = maps_NHKW[..., : count // 2 * 2, :, :, :].unflatten(-4, (-1, 2))
        earlier, later = pairs.unbind(-4)
        joined = later[..., value_dim:] @ earlier
        joined[..., :value_dim] += later[..., :value_dim]
        maps_NHKW = torch.cat([joined, maps_NHKW[..., count // 2 * 2:, :, :, :]], -4) if count % 2 else joined
    return maps_NHKW.squeeze(-4)
