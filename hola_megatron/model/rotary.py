"""Rotary positions of softmax-attention layers (HOLA and GDN layers carry no positions)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(q_BSHK: Tensor, k_BSHK: Tensor, theta: float, cuts: Tensor | None,
           before: int = 0) -> tuple[Tensor, Tensor]:
    """Rotate halves of every head by position; positions start at 0 in each document. fp32 inside.

    before: tokens of the first document (without cuts: of every row) that other ranks hold.
    """
    length, width = q_BSHK.shape[1], q_BSHK.shape[3]
    position = torch.arange(length, device=q_BSHK.device)
    if cuts is not None:
        starts = cuts[:-1].to(q_BSHK.device).long()
        lengths = cuts.diff().to(q_BSHK.device).long()
        starts[0] -= before
        position = position - torch.repeat_interleave(starts, lengths, output_size=length)
    else:
        position = position + before
    frequency = theta ** (-torch.arange(0, width, 2, device=q_BSHK.device, dtype=torch.float32) / width)
    angle = position[:, None].float() * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turn(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    return turn(q_BSHK), turn(k_BSHK)
