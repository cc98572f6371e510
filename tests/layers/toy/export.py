"""The toy layer of exported models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hola_megatron.layers.exported.kind_hola import ExportedKind
from hola_megatron.layers.exported.memory_hola import LayerMemory
from hola_megatron.layers.exported.packing_hola import Packing


class ToyMemory(LayerMemory):
    """mean [N, H, V]: of the tokens so far."""

    fields = ("mean",)


class ExportedToy(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.width, value = config.value_dim, config.num_heads * config.value_dim
        self.v_proj = nn.Linear(config.hidden_size, value, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, value, bias=False)
        self.o_proj = nn.Linear(value, config.hidden_size, bias=False)
        self.rate = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))

    def forward(self, hidden_BTD: Tensor, packing: Packing | None, memory: ToyMemory | None) -> Tensor:
        x = hidden_BTD if packing is None else packing.pack(hidden_BTD)
        starts = set() if packing is None else set(packing.cu_seqlens.tolist())
        v, gate = (project(x).unflatten(-1, (-1, self.width)) for project in (self.v_proj, self.g_proj))
        mean = torch.zeros_like(v[:, 0]) if memory is None or memory.mean is None else memory.mean
        rate, means = self.rate.sigmoid()[:, None].to(v.dtype), []
        for t in range(v.shape[1]):
            mean = rate * (torch.zeros_like(mean) if t in starts else mean) + (1 - rate) * v[:, t]
            means.append(mean)
        if memory is not None:
            memory.mean = mean.detach()
        out = self.o_proj((torch.stack(means, 1) * gate.sigmoid()).flatten(-2))
        return out if packing is None else packing.unpack(out)


def zero(parameter: Tensor, config: Any) -> None:
    parameter.fill_(0.0)


KIND = ExportedKind("toy", None, ExportedToy, ToyMemory, float32=lambda config: ("rate",), initial={"rate": zero})
