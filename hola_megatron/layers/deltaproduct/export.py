"""The Gated DeltaProduct layer of exported models. Copied into every export."""

from __future__ import annotations

from typing import Any

from hola_megatron.layers.exported.kind_hola import ExportedKind
from hola_megatron.layers.gdn.export import INITIAL, DeltaMemory, PackedCalls, float32

try:
    from hola_kernels.modules import GatedDeltaProduct
except ImportError:  # the same code, bundled with the export
    from .hola_ops import GatedDeltaProduct


class ExportedDeltaProduct(PackedCalls, GatedDeltaProduct):
    """The Gated DeltaProduct mixer of exported models. config: HolaConfig."""

    def __init__(self, config: Any):
        super().__init__(
            config.hidden_size, config.num_heads, config.key_dim, config.value_dim, delta_steps=config.delta_steps,
            conv_width=config.conv_width, rule=config.rule, beta_range=config.beta_range, norm_eps=config.norm_eps,
            init_std=config.initializer_range, backend=config.backend)
        self.config = config


def cuda_graph_problem(config: Any) -> str:
    """Why a decoding step cannot be captured in a CUDA graph."""
    return "deltaproduct layers are not captured"


KIND = ExportedKind("deltaproduct", None, ExportedDeltaProduct, DeltaMemory, float32, INITIAL, cuda_graph_problem)
