"""The HOLA layer of exported models. Copied into every export."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hola_megatron.layers.exported.kind_hola import ExportedKind
from hola_megatron.layers.gdn.export import INITIAL, DeltaMemory, PackedCalls, shared
from hola_megatron.layers.gdn.export import cuda_graph_problem as state_cuda_graph_problem
from hola_megatron.layers.gdn.export import float32 as float32_of_the_state

try:
    from hola_kernels.modules import HolaAttention
except ImportError:  # the same code, bundled with the export
    from .hola_ops import HolaAttention


class ExportedHola(PackedCalls, HolaAttention):
    """The HOLA mixer of exported models. config: HolaConfig."""

    def __init__(self, config: Any):
        super().__init__(
            config.hidden_size, config.num_heads, config.key_dim, config.value_dim, block=config.cache_block,
            slots=config.cache_slots, local=config.cache_local, window=config.cache_window, score=config.cache_score,
            read_norm=config.cache_read_norm, rope_theta=config.cache_rope_theta, merge=config.cache_merge,
            router_width=config.cache_router_width,
            sink=config.cache_sink, gate_init=config.cache_gate_init, **shared(config))
        self.config = config


def float32(config: Any) -> tuple[str, ...]:
    """Names of parameters that stay float32."""
    gate = ("gate",) if config.cache_merge == "add" and config.rule != "none" else ()
    sink = ("sink",) if config.cache_sink else ()
    route = ("route_out", "route_bias") if config.cache_score == "learned" else ()
    return (*float32_of_the_state(config), "gamma_q", "gamma_k", *gate, *sink, *route)


def cuda_graph_problem(config: Any) -> str | None:
    """Why a decoding step cannot be captured in a CUDA graph; None if it can."""
    if config.rule == "none":
        return "rule 'none' decodes by plain torch operations"
    if config.cache_score not in ("betae", "e", "betav"):
        return f"cache_score {config.cache_score!r} is not one of betae, e, betav"
    if config.cache_local != "block" or not config.cache_slots or config.cache_read_norm == "none":
        return "cache_local is not 'block', cache_slots is 0 or cache_read_norm is 'none'"
    if config.cache_merge != "add" or config.cache_rope_theta is not None:
        return "cache_merge is not 'add' or cache_rope_theta is set"
    return state_cuda_graph_problem(config)


def _gate(parameter: Tensor, config: Any) -> None:
    parameter.fill_(config.cache_gate_init)


def _normal(parameter: Tensor, config: Any) -> None:
    parameter.normal_(0.0, config.initializer_range)


def _one(parameter: Tensor, config: Any) -> None:
    parameter.fill_(1.0)


def _zero(parameter: Tensor, config: Any) -> None:
    parameter.fill_(0.0)


KIND = ExportedKind("hola", "H", ExportedHola, DeltaMemory, float32,
                    {**INITIAL, "gamma_q": _one, "gamma_k": _one, "gate": _gate, "sink": _zero, "route_out": _normal,
                     "route_bias": _zero}, cuda_graph_problem)
