"""The HQLT layer of exported models. Travels with exported weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hola_megatron.layers.exported.kind_hola import ExportedKind
from hola_megatron.layers.exported.memory_hola import LayerMemory
from hola_megatron.layers.exported.packing_hola import Packing

try:
    from hola_kernels.hqlt.memory import HqltState
    from hola_kernels.modules import HqltAttention, LayerCache
except ImportError:  # the same code, bundled with the export
    from .hola_ops import HqltAttention, HqltState, LayerCache


class HqltMemory(LayerMemory):
    """A constant number of bytes at any length: the tensors of HqltState."""

    fields = ("length", "state", "read", "keys", "values", "strength")


class ExportedHqlt(HqltAttention):
    """The HQLT mixer of exported models. config: HolaConfig."""

    def __init__(self, config: Any):
        super().__init__(
            config.hidden_size, config.num_heads, config.key_dim, config.value_dim, blend=config.hqlt_blend,
            mixing=config.hqlt_mixing, window=config.hqlt_window, rope_theta=config.hqlt_rope_theta,
            beta_range=config.beta_range, norm_eps=config.norm_eps, init_std=config.initializer_range,
            backend=config.backend)
        self.config = config

    def forward(self, hidden_BTD: Tensor, packing: Packing | None, memory: HqltMemory | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `memory` is read and brought up to date."""
        cache = None if memory is None else LayerCache()
        if memory is not None and memory.is_initialized:
            cache.state = HqltState(**{name: getattr(memory, name) for name in memory.fields})
        if packing is None:
            out = super().forward(hidden_BTD, cache=cache)
        else:
            out = packing.unpack(super().forward(packing.pack(hidden_BTD), cu_seqlens=packing.documents, cache=cache))
        if memory is not None:
            for name in memory.fields:
                setattr(memory, name, getattr(cache.state, name))
        return out


def cuda_graph_problem(config: Any) -> str:
    """Why a decoding step cannot be captured in a CUDA graph."""
    return "hqlt layers are not recorded"


KIND = ExportedKind("hqlt", None, ExportedHqlt, HqltMemory, cuda_graph_problem=cuda_graph_problem)
