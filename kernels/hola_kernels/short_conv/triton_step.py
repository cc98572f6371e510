"""One decoded token of the short convolution: one launch, its tail moved up in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.integers import cdiv

CHANNELS = 256  # of a program


@triton.jit
def _step_kernel(x, weight, tail, y, D, W: tl.constexpr, CHANNELS: tl.constexpr):
    """y = silu of the last W inputs of CHANNELS channels of one sequence; a thread moves its own channels' tail."""
    n, channel = tl.program_id(1), tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    here = channel < D
    now = tl.load(x + n * D + channel, mask=here, other=0.0)
    total = now.to(tl.float32) * tl.load(weight + channel * W + W - 1, mask=here, other=0.0).to(tl.float32)
    before = tail + n.to(tl.int64) * (W - 1) * D + channel
    for j in tl.static_range(W - 1):
        held = tl.load(before + j * D, mask=here, other=0.0).to(x.dtype.element_ty)
        total += held.to(tl.float32) * tl.load(weight + channel * W + j, mask=here, other=0.0).to(tl.float32)
        if j > 0:
            tl.store(before + (j - 1) * D, held.to(tail.dtype.element_ty), mask=here)
    if W > 1:
        tl.store(before + (W - 2) * D, now.to(tail.dtype.element_ty), mask=here)
    tl.store(y + n * D + channel, (total * tl.sigmoid(total)).to(y.dtype.element_ty), mask=here)


def short_conv_step_triton(x_ND: Tensor, weight_DW: Tensor, tail_NJD: Tensor) -> Tensor:
    """y [N, D] in x's dtype; contiguous `tail` [N, W - 1, D] is updated in place."""
    y = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device)
    sequences, channels = x_ND.shape
    _step_kernel[(cdiv(channels, CHANNELS), sequences)](
        x_ND.contiguous(), weight_DW.contiguous(), tail_NJD, y, channels, W=weight_DW.shape[1], CHANNELS=CHANNELS,
        num_warps=2)
    return y
