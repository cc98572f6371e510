"""A layer of a HOLA model around its mixer, and the MLP. Copied into every export.

Shapes: B rows, T columns of a call, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hola_megatron.layers.exported.kind_hola import ExportedKind
from hola_megatron.layers.exported.memory_hola import LayerMemory
from hola_megatron.layers.exported.packing_hola import Packing

from .configuration_hola import HolaConfig


class HolaMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: HolaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HolaLayer(GradientCheckpointingLayer):
    """Norm, mixer, norm, MLP, with residuals."""

    def __init__(self, config: HolaConfig, kind: ExportedKind):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = kind.mixer(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = HolaMLP(config)

    def forward(self, hidden_BTD: Tensor, packing: Packing | None = None,
                past_key_values: LayerMemory | None = None,
                cache: LayerMemory | None = None) -> Tensor:
        """past_key_values or cache: this layer's memory, by the name that gradient checkpointing leaves out."""
        memory = past_key_values if cache is None else cache
        with torch.cuda.device_of(hidden_BTD):  # Triton launches on the current GPU, wherever a model's layers lie
            hidden_BTD = hidden_BTD + self.mixer(self.mixer_norm(hidden_BTD), packing, memory)
        return hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))
