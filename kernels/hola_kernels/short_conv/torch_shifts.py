"""The short convolution as W shifted products, plain PyTorch: runs anywhere, differentiable.

Every document follows its own tail of W - 1 tokens, so one shift of the whole
row serves all documents and nothing crosses from one to the next.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.norms import compute_dtype


def short_conv_shifts(x_MD: Tensor, weight_DW: Tensor, cu_seqlens: Tensor, tail_NJD: Tensor) -> tuple[Tensor, Tensor]:
    """Flat tokens in N segments, each with a tail of J = W - 1 tokens -> (y [M, D], tail after [N, J, D]) like x."""
    compute = compute_dtype(x_MD)
    tokens, width, segments = x_MD.shape[0], weight_DW.shape[1], tail_NJD.shape[0]
    before = width - 1
    device = x_MD.device
    segment = torch.repeat_interleave(torch.arange(segments, device=device), cu_seqlens.diff(), output_size=tokens)
    index = torch.arange(tokens, device=device) + (segment + 1) * before  # of each token after the tails
    rows = torch.cat([tail_NJD.to(x_MD.dtype).flatten(0, 1), x_MD])
    order = torch.empty(rows.shape[0], dtype=torch.int64, device=device)
    order[index] = torch.arange(tokens, device=device) + segments * before
    tail_index = cu_seqlens[:-1, None] + torch.arange(segments, device=device)[:, None] * before
    order[(tail_index + torch.arange(before, device=device)).flatten()] = torch.arange(segments * before, device=device)
    rows = rows.index_select(0, order)
    weight, compute_rows = weight_DW.to(compute), rows.to(compute)
    total = sum(weight[:, before - j] * compute_rows.index_select(0, index - j) for j in range(width))
    last = cu_seqlens[1:, None] + torch.arange(segments, device=device)[:, None] * before
    last = last + torch.arange(before, device=device)
    return F.silu(total).to(x_MD.dtype), rows.index_select(0, last.flatten()).view_as(tail_NJD)
