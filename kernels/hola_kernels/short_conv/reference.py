"""The definition of the short convolution, token by token.

    y_t = SiLU(sum_j weight[:, W - 1 - j] * x_{t - j})       j = 0 .. W - 1, each channel on its own
Tokens before the first of a document come from its tail (zeros at a document's start).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype


def short_conv_reference(x_MD: Tensor, weight_DW: Tensor, cu_seqlens: Tensor,
                         tail_NJD: Tensor) -> tuple[Tensor, Tensor]:
    """Same contract as `torch_shifts.short_conv_shifts`."""
    compute = compute_dtype(x_MD)
    weight, width = weight_DW.to(compute), weight_DW.shape[1]
    outputs, tails = [], []
    bounds = cu_seqlens.tolist()
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        window = list(tail_NJD[n])
        for t in range(start, end):
            window.append(x_MD[t])
            total = sum(weight[:, j] * window[len(window) - width + j].to(compute) for j in range(width))
            outputs.append(total * torch.sigmoid(total))
        last = window[len(window) - (width - 1):]
        tails.append(torch.stack(last) if last else tail_NJD[n])
    y_MD = torch.stack(outputs) if outputs else x_MD
    return y_MD.to(x_MD.dtype), torch.stack(tails) if tails else tail_NJD
