"""The HAM layer of exported models. Copied into every export."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hola_megatron.layers.exported.kind_hola import ExportedKind
from hola_megatron.layers.gdn.export import INITIAL, DeltaMemory, PackedCalls, shared
from hola_megatron.layers.gdn.export import float32 as float32_of_the_state

try:
    from hola_kernels.modules import HamAttention
except ImportError:  # the same code, bundled with the export
    from .hola_ops import HamAttention


class HamMemory(DeltaMemory):
    """The last inputs of the convolutions, and the HamState: the state, and the kept tokens, which grow."""


class ExportedHam(PackedCalls, HamAttention):
    """The HAM mixer of exported models. config: HolaConfig.

    Its threshold is that of the checkpoint; `end_step` of every layer after a training step moves it on.
    """

    def __init__(self, config: Any):
        super().__init__(
            config.hidden_size, config.num_heads, config.key_dim, config.value_dim, router=config.ham_router,
            share=config.ham_share, threshold=config.ham_threshold, rate=config.ham_rate,
            freeze_steps=config.ham_freeze_steps, router_width=config.ham_router_width, **shared(config))
        self.config = config


def float32(config: Any) -> tuple[str, ...]:
    """Names of parameters that stay float32."""
    router = ("route_out", "route_bias") if config.ham_router == "learned" else ()
    return (*float32_of_the_state(config), "gamma_q", "gamma_k", *router)


def cuda_graph_problem(config: Any) -> str:
    """Why a decoding step cannot be captured in a CUDA graph."""
    return "the memory of ham layers grows with what they keep, and a captured graph has fixed sizes"


def _one(parameter: Tensor, config: Any) -> None:
    parameter.fill_(1.0)


def _zero(parameter: Tensor, config: Any) -> None:
    parameter.fill_(0.0)


def _normal(parameter: Tensor, config: Any) -> None:
    parameter.normal_(0.0, config.initializer_range)


KIND = ExportedKind("ham", None, ExportedHam, HamMemory, float32,
                    {**INITIAL, "gamma_q": _one, "gamma_k": _one, "route_out": _normal, "route_bias": _zero},
                    cuda_graph_problem, ("threshold", "updates"))
