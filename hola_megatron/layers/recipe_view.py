"""Protocols of the recipe's sections that layer kinds read; `hola_megatron.recipe.schema` implements them.

Recipes name layer kinds, so the schema imports the registry; the kinds must not import the schema.
"""

from __future__ import annotations

from typing import Any, Protocol


class CacheConfig(Protocol):
    """The recipe's model.cache."""

    block: int
    slots: int
    local: str
    window: int | None
    score: str
    read_norm: str
    router_width: int
    rope_theta: float | None
    merge: str
    sink: bool
    gate_init: float


class HqltConfig(Protocol):
    """The recipe's model.hqlt."""

    blend: str
    window: int
    rope_theta: float
    mixing: str


class HamConfig(Protocol):
    """The recipe's model.ham."""

    router: str
    share: float
    threshold: float
    rate: float
    freeze_steps: int
    router_width: int


class ModelConfig(Protocol):
    """The recipe's model section: fields that every kind may read. Widths are of the whole model, in channels."""

    layers: int
    hidden_size: int
    pattern: str
    heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    rule: str
    beta_range: int
    delta_steps: int
    state_delay: int
    state_delay_mode: str
    attention_heads: int
    attention_kv_heads: int | None
    attention_qk_norm: bool
    attention_window: int
    rope_theta: float | None
    norm_eps: float
    init_std: float
    cache: CacheConfig
    hqlt: HqltConfig
    ham: HamConfig
    backend: str


class TrainConfig(Protocol):
    """The recipe's train section."""

    sequence_length: int
    micro_batch_size: int
    precision: str
    recompute: str
    cuda_graph: bool


class ParallelConfig(Protocol):
    """The recipe's parallel section: numbers of ranks."""

    tensor: int
    sequence: bool
    pipeline: int
    context: int


class Recipe(Protocol):
    """A recipe. data and fp8 have the fields of the schema's sections of these names."""

    model: ModelConfig
    train: TrainConfig
    parallel: ParallelConfig
    data: Any
    fp8: Any
