"""The Gated DeltaNet layer of exported models. Copied into every export.

The layer is imported from the package hola_kernels where it is installed (with its GPU kernels), else from hola_ops.py,
the same source bundled into one module. Padding is removed, not masked: the tokens of a padded batch, and the documents
of a packed row, are packed one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hola_megatron.layers.exported.kind_hola import ExportedKind
from hola_megatron.layers.exported.memory_hola import LayerMemory
from hola_megatron.layers.exported.packing_hola import Packing

try:
    from hola_kernels.modules import GatedDeltaNet
    from hola_kernels.modules.initial import decay_rate, step_bias
except ImportError:  # the same code, bundled with the export
    from .hola_ops import GatedDeltaNet, decay_rate, step_bias

STEP_WIDTHS, STEP_TAPS = (16, 32, 64, 128, 256), 4  # limits of the decoding kernels


class DeltaMemory(LayerMemory):
    """Decoding state of constant size.

    q_tail, k_tail [N, W - 1, H K], v_tail [N, W - 1, H V]: the last inputs of the convolutions
    state: float32 [N, H, K, V], or the HolaState of a layer with an exact cache
    """

    fields = ("q_tail", "k_tail", "v_tail", "state")


class PackedCalls:
    """Mixin for a module of hola_kernels.modules: removes padding before the call and restores it after."""

    config: Any

    def forward(self, hidden_BTD: Tensor, packing: Packing | None, memory: DeltaMemory | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `memory` is read and updated."""
        # the Triton step reads nothing on the host, so it can be captured
        self.step_backend = "triton" if self.config.cuda_graph and hidden_BTD.is_cuda else self.config.backend
        if packing is None:
            return super().forward(hidden_BTD, cache=memory)
        return packing.unpack(super().forward(packing.pack(hidden_BTD), cu_seqlens=packing.documents, cache=memory))


class ExportedGatedDeltaNet(PackedCalls, GatedDeltaNet):
    """The Gated DeltaNet mixer of exported models. config: HolaConfig."""

    def __init__(self, config: Any):
        super().__init__(config.hidden_size, config.num_heads, config.key_dim, config.value_dim, **shared(config))
        self.config = config


def shared(config: Any) -> dict[str, Any]:
    """Keyword arguments of GatedDeltaNet from an exported configuration."""
    return {"conv_width": config.conv_width, "rule": config.rule, "beta_range": config.beta_range,
            "state_delay": config.state_delay, "state_delay_mode": config.state_delay_mode, "norm_eps": config.norm_eps,
            "init_std": config.initializer_range, "backend": config.backend}


def float32(config: Any) -> tuple[str, ...]:
    """Names of parameters that stay float32."""
    return ("A_log", "dt_bias") if config.rule == "gdn" else ()


def cuda_graph_problem(config: Any) -> str | None:
    """Why a decoding step cannot be captured in a CUDA graph; None if it can."""
    for name in ("key_dim", "value_dim"):
        if getattr(config, name) not in STEP_WIDTHS:
            return f"{name} {getattr(config, name)} is none of {', '.join(map(str, STEP_WIDTHS))}"
    if config.state_delay:
        return "a delayed state has not been captured"
    if config.conv_width > STEP_TAPS:
        return f"conv_width {config.conv_width} is over {STEP_TAPS}"
    return None if config.backend in ("auto", "triton") else f"backend {config.backend!r} reads lengths on the host"


def _drawn(draw: Callable[[tuple[int, ...]], Tensor]) -> Callable[[Tensor, Any], None]:
    """Initialisation of a parameter in place by a function of hola_kernels.modules.initial."""
    def fill(parameter: Tensor, config: Any) -> None:
        parameter.copy_(draw(tuple(parameter.shape)))

    return fill


INITIAL = {"A_log": _drawn(decay_rate), "dt_bias": _drawn(step_bias)}

KIND = ExportedKind("gdn", "G", ExportedGatedDeltaNet, DeltaMemory, float32, INITIAL, cuda_graph_problem)
