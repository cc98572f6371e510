"""The activation of a layer's MLP, used where Megatron expects a module of Transformer Engine."""

from __future__ import annotations

from torch import Tensor, nn

from hola_kernels.swiglu import swiglu
from hola_megatron.model.config import HolaTransformerConfig


class SwiGLU(nn.Module):
    """x [S, B, 2F] -> SiLU(x[..., :F]) * x[..., F:]; F is this tensor rank's shard of the MLP's width.

    No parameters. Each rank's rows of the first projection are its gates, then its ups (build.py).
    """

    def __init__(self, config: HolaTransformerConfig):
        super().__init__()
        self.backend = config.recipe_model.backend

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x=x, backend=self.backend)
