"""The softmax attention layer of exported models. Travels with exported weights.

Shapes: B (or N) rows, T columns of a call, H heads, G key heads (H is a multiple), K width of a head, D width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hola_megatron.layers.exported.kind_hola import ExportedKind
from hola_megatron.layers.exported.memory_hola import LayerMemory
from hola_megatron.layers.exported.packing_hola import Packing


class AttentionMemory(LayerMemory):
    """Every token: keys (rotated) [N, G, S, K], values [N, G, S, K], and which of them are tokens [N, S]."""

    fields = ("keys", "values", "valid")

    def append(self, keys: Tensor, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take T more tokens ([N, G, T, K] and [N, T]); returns all of them."""
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
            valid = torch.cat([self.valid, valid], 1)
        self.keys, self.values, self.valid = keys.detach(), values.detach(), valid
        return keys, values, valid


class ExportedAttention(nn.Module):
    """Causal softmax attention with rotary positions ; padding takes no position."""

    def __init__(self, config: Any):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.head_dim = width // config.num_attention_heads
        keys = (config.num_key_value_heads or config.num_attention_heads) * self.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        if config.attention_qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)

    def forward(self, hidden_BTD: Tensor, packing: Packing | None, memory: AttentionMemory | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `memory` is read and brought up to date."""
        if packing is not None and packing.position is not None:
            return packing.unpack(self._documents(packing.pack(hidden_BTD), packing))
        valid = hidden_BTD.new_ones(hidden_BTD.shape[:2], dtype=torch.bool) if packing is None else packing.valid
        first = memory is None or not memory.is_initialized
        seen = 0 if first else memory.valid.sum(1, keepdim=True)
        q, k, v = self._tokens(hidden_BTD, (valid.cumsum(1) - 1).clamp_min(0) + seen)
        everything = (k, v, valid) if memory is None else memory.append(k, v, valid)
        if first and packing is None:
            mixed = attend(q, k, v, is_causal=True)
        else:
            k, v, valid = everything
            mixed = attend(q, k, v, attn_mask=_visible(valid, q.shape[2]))
        return self._out(mixed)

    def _documents(self, x_1MD: Tensor, packing: Packing) -> Tensor:
        """[1, M, D] -> [1, M, D], each document by itself: memory for its own scores alone."""
        tokens = self._tokens(x_1MD, packing.position[None])
        mixed = [self._read(*(x[:, :, start:end] for x in tokens))
                 for start, end in pairwise(packing.cu_seqlens.tolist())]
        return self._out(torch.cat(mixed, 2))

    def _read(self, q_NHTK: Tensor, k_NGTK: Tensor, v_NGTK: Tensor) -> Tensor:
        """What the tokens of whole rows, one document each, read."""
        return attend(q_NHTK, k_NGTK, v_NGTK, is_causal=True)

    def _tokens(self, hidden_NTD: Tensor, position_NT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, H, T, K] and k, v [N, G, T, K]: normed and rotated."""
        q, k, v = (project(hidden_NTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.attention_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope_theta is not None:
            q, k = (_rotate(x, position_NT, self.config.rope_theta) for x in (q, k))
        return q, k, v

    def _out(self, mixed_NHTK: Tensor) -> Tensor:
        return self.o_proj(mixed_NHTK.transpose(1, 2).flatten(-2))


def attend(q_NHTK: Tensor, k_NGSK: Tensor, v_NGSK: Tensor, **how: Any) -> Tensor:
    """scaled_dot_product_attention, each key head for H / G query heads."""
    if q_NHTK.shape[1] != k_NGSK.shape[1]:
        how["enable_gqa"] = True
    return F.scaled_dot_product_attention(q_NHTK, k_NGSK, v_NGSK, **how)


def cuda_graph_problem(config: Any) -> str:
    return "the memory of attention layers grows with every token, and a captured graph has fixed sizes"


def _rotate(x_NHTK: Tensor, position_NT: Tensor, theta: float) -> Tensor:
    """Rotate halves of every head by position; in float32, of float64 numbers in float64."""
    width, wide = x_NHTK.shape[-1], torch.float64 if x_NHTK.dtype == torch.float64 else torch.float32
    frequency = theta ** (-torch.arange(0, width, 2, device=x_NHTK.device, dtype=wide) / width)
    angle = position_NT[:, None, :, None].to(wide) * frequency
    a, b = x_NHTK.to(wide).chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_NHTK.dtype)


def _visible(valid_NS: Tensor, queries: int) -> Tensor:
    """[N, 1, T, S] bool: tokens up to each query; a padding query sees itself, so that no row is empty."""
    total = valid_NS.shape[1]
    column = torch.arange(total, device=valid_NS.device)
    row = torch.arange(total - queries, total, device=valid_NS.device)[:, None]
    return (((column <= row) & valid_NS[:, None]) | (column == row))[:, None]


KIND = ExportedKind("attention", "A", ExportedAttention, AttentionMemory, cuda_graph_problem=cuda_graph_problem)
