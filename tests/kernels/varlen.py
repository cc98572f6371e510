"""torch's attention over documents of varying lengths, which has no CPU form: the definition in its place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hola_kernels.softmax_attention import softmax_attention


def stand_in(seen: dict[str, Any]) -> Callable[..., Tensor]:
    """A function that takes varlen_attn's arguments, and writes what it was given into `seen`."""
    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, key_bounds: Tensor, longest: int,
                    longest_keys: int, *, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False) -> Tensor:
        seen.update(window=window_size, gqa=enable_gqa, longest=(longest, longest_keys), shapes=(q.shape, k.shape))
        window, parts = None if window_size[0] < 0 else window_size[0] + 1, []
        for (a, b), (c, d) in zip(*(itertools.pairwise(x.tolist()) for x in (bounds, key_bounds)), strict=True):
            assert b - a <= longest and d - c <= longest_keys
            one = {"q": q[None, a:b], "k": k[None, c:d], "v": v[None, c:d]}
            parts.append(softmax_attention(**one, earlier=d - c - (b - a), window=window, backend="reference")[0])
        return torch.cat(parts)

    return varlen_attn
