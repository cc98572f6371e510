"""Rotary positions of queries and keys whose positions the caller knows (Su et al. 2021, RoFormer, arXiv 2104.09864).

    angle_i = position * base^(-2 i / K), i < K / 2        (a, b) -> (a cos - b sin, b cos + a sin)

where a is number i of a head and b number K / 2 + i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.errors import KernelError
from hola_kernels.norms import compute_dtype, read_normalize
from hola_kernels.options import CacheOptions


def angles(position: Tensor, key_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 1, K / 2] of the rotation at positions [...]; dtype: float32 or float64."""
    frequency = base ** (-torch.arange(0, key_dim, 2, device=position.device, dtype=dtype) / key_dim)
    angle = position.to(dtype)[..., None] * frequency
    return angle.cos()[..., None, :], angle.sin()[..., None, :]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., H, K] with its halves rotated; computed in the dtype of cos, returned in that of x."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def token_positions(cu_seqlens: Tensor, tokens: int, length: Tensor) -> Tensor:
    """[tokens] int64: position of each token in its sequence.

    cu_seqlens [N + 1] of the flat tokens; length [N]: tokens of each sequence before these.
    """
    flat = torch.arange(tokens, device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens, flat, right=True) - 1
    return flat - cu_seqlens[segment] + length[segment]


def check_positions(q: Tensor, options: CacheOptions) -> None:
    """KernelError for rotary positions of an odd K; q [..., K]."""
    if options.rope_theta is not None and q.shape[-1] % 2:
        raise KernelError(f"q {tuple(q.shape)} must have an even K for rope_theta = {options.rope_theta}")


def with_positions(q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor, options: CacheOptions, cu_seqlens: Tensor,
                   length: Tensor) -> dict[str, Tensor | str]:
    """`read_tokens` of q, k [B, T, H, K] of N sequences, of which `length` [N] tokens came before."""
    if options.rope_theta is None:
        return read_tokens(q, k, gamma_q, gamma_k, options, None)
    position = token_positions(cu_seqlens, q.shape[0] * q.shape[1], length)
    return read_tokens(q, k, gamma_q, gamma_k, options, position.view(q.shape[:2]))


def read_tokens(q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor, options: CacheOptions,
                position: Tensor | None) -> dict[str, Tensor | str]:
    """q, k, gamma_q, gamma_k and read_norm for the cache attention at these positions.

    q, k [..., H, K], position [...]. Without rotary positions they are as given. With them queries and keys come
    normalised and rotated, and are read without a norm: a gain per channel does not commute with the rotation.
    """
    if options.rope_theta is None:
        return {"q": q, "k": k, "gamma_q": gamma_q, "gamma_k": gamma_k, "read_norm": options.read_norm}
    compute = compute_dtype(q)
    cos, sin = angles(position, q.shape[-1], options.rope_theta, compute)
    q, k = (rotated(read_normalize(x.to(compute), gamma.to(compute), options.read_norm), cos, sin).to(x.dtype)
            for x, gamma in ((q, gamma_q), (k, gamma_k)))
    one = torch.ones_like(gamma_q)
    return {"q": q, "k": k, "gamma_q": one, "gamma_k": one, "read_norm": "none"}
