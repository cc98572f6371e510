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
    """y = silu of the last W <= 4 inputs of CHANNELS channels of a sequence, whose tail is read whole, then moved."""
    blocks = tl.cdiv(D, CHANNELS)  # one axis of programs: a second has room for 65,535 sequences
    n = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    here = channel < D
    now = tl.load(x + n * D + channel, mask=here, other=0.0)
    before = tail + n * (W - 1) * D + channel
    a = tl.load(before, mask=here & (W > 1), other=0.0)
    b = tl.load(before + D, mask=here & (W > 2), other=0.0)
    c = tl.load(before + 2 * D, mask=here & (W > 3), other=0.0)
    tl.debug_barrier()  # the stores may give a channel to another thread than its load did
    taps = weight + channel * W
    total = now.to(tl.float32) * tl.load(taps + W - 1, mask=here, other=0.0).to(tl.float32)
    total += _rounded(a, x) * tl.load(taps, mask=here & (W > 1), other=0.0).to(tl.float32)
    total += _rounded(b, x) * tl.load(taps + 1, mask=here & (W > 2), other=0.0).to(tl.float32)
    total += _rounded(c, x) * tl.load(taps + 2, mask=here & (W > 3), other=0.0).to(tl.float32)
    kind = tail.dtype.element_ty
    tl.store(before, b, mask=here & (W > 2))
    tl.store(before + D, c, mask=here & (W > 3))
    tl.store(before + (W - 2) * D, now.to(kind), mask=here & (W > 1))
    tl.store(y + n * D + channel, (total * tl.sigmoid(total)).to(y.dtype.element_ty), mask=here)


@triton.jit
def _rounded(held, x):
    """A saved input in the layout of x."""
    return held.to(x.dtype.element_ty).to(tl.float32)


def short_conv_step_triton(x_ND: Tensor, weight_DW: Tensor, tail_NJD: Tensor) -> Tensor:
    """y [N, D] in x's dtype; contiguous `tail` [N, W - 1, D] is updated in place."""
    y = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device)
    sequences, channels = x_ND.shape
    _step_kernel[(cdiv(channels, CHANNELS) * sequences,)](
        x_ND.contiguous(), weight_DW.contiguous(), tail_NJD, y, channels, W=weight_DW.shape[1], CHANNELS=CHANNELS,
        num_warps=2)
    return y
