"""What a layer kind declares for exported models. Copied into every export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hola_megatron.layers.exported.memory_hola import LayerMemory


@dataclass(frozen=True)
class ExportedKind:
    """The exported form of a layer kind.

    name, letter: as in `LayerKind`.
    mixer: its class, built as mixer(config) and called as mixer(hidden [B, T, D], packing, memory) -> [B, T, D].
    memory: class of its decoding state, a `LayerMemory`.
    float32: config -> names of the mixer's parameters that stay float32 in a 16-bit model.
    initial: for each parameter of the mixer itself, (parameter, config) -> None, which sets its initial value.
        Linears are initialised from a normal distribution, submodules by their own reset_parameters.
    cuda_graph_problem: config -> why a decoding step cannot be captured in a CUDA graph, or None.
    float32_buffers: last names of its buffers, which are stored in float32.
    """

    name: str
    letter: str | None
    mixer: type[nn.Module]
    memory: type[LayerMemory]
    float32: Callable[[Any], tuple[str, ...]] = lambda config: ()
    initial: dict[str, Callable[[Tensor, Any], None]] = field(default_factory=dict)
    cuda_graph_problem: Callable[[Any], str | None] = lambda config: None
    float32_buffers: tuple[str, ...] = ()
