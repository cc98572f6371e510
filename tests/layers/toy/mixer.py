"""The toy mixer as a Megatron module."""

from __future__ import annotations

import torch
from torch import Tensor

from hola_megatron.layers.documents import Documents
from hola_megatron.layers.mixer import Mixer
from hola_megatron.parallel.context import ContextParallel


class ToyMixer(Mixer):
    def mix(self, projected_BSF: Tensor, documents: Documents | None, cp: ContextParallel | None) -> Tensor:
        v, gate = (self._split_heads(x, self.model.value_dim) for x in projected_BSF.split(self.widths, -1)[:2])
        starts = {0} if documents is None else set(documents.cu_seqlens.tolist())
        rate, mean, means = self.rate.sigmoid()[:, None].to(v.dtype), torch.zeros_like(v[:, 0]), []
        for t in range(v.shape[1]):
            mean = rate * (torch.zeros_like(mean) if t in starts else mean) + (1 - rate) * v[:, t]
            means.append(mean)
        return (torch.stack(means, 1) * gate.sigmoid()).flatten(-2)
