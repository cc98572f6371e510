"""The definition (Shazeer 2020, arXiv 2002.05202, without biases).

    y = SiLU(gate) * up        gate = x[:F], up = x[F:] of every row, SiLU(z) = z / (1 + exp(-z)); in float32
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype


def swiglu_reference(x_M2F: Tensor) -> Tensor:
    """Rows x [M, 2F] -> y [M, F] in x's dtype."""
    x = x_M2F.to(compute_dtype(x_M2F))
    width = x.shape[1] // 2
    gate, up = x[:, :width], x[:, width:]
    return (gate / (1 + torch.exp(-gate)) * up).to(x_M2F.dtype)
