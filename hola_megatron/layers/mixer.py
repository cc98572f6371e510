"""Base class of all layer kinds' token mixers, as Megatron modules.

A mixer is [input projection of named sections] -> [mix over time, per head] -> [output projection]. Its parameters are
those of its kind's table (spec.Parameter). Heads are sharded over tensor-parallel ranks, so a mixer sends no messages:
each rank has the state and the exact cache of its heads. A fused parameter concatenates its tensors *per rank*;
`Section` tags let checkpoints store the logical tensors, so any tensor-parallel size loads any other. Where sequences
are sharded over context-parallel ranks, `ContextParallel` describes the shard and `parallel.context` exchanges what
other ranks need.

Shapes: S tokens on this rank, B rows (1 for packed documents), D width, H heads of this
rank, K key and V value width of a head.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hola_megatron.layers.documents import Documents
from hola_megatron.layers.padding import projection_padding
from hola_megatron.layers.spec import LayerKind, Parameter
from hola_megatron.parallel.context import ContextParallel
from hola_megatron.parallel.sequence_shard import SequenceShard


@dataclass(frozen=True)
class Section:
    """A logical tensor inside a fused parameter: `rows` of it on this rank, along axis 0."""

    name: str
    rows: int


@dataclass
class MixerSubmodules:
    """Classes of the linear layers: Megatron's own, or Transformer Engine's."""

    in_proj: Any = None
    out_proj: Any = None


class Mixer(MegatronModule):
    """Fused column-parallel input projection, row-parallel output projection, and the other parameters of the table.

    kind: the layer kind whose table it follows. `config.recipe_model` is the recipe's model section.
    """

    def __init__(self, config: TransformerConfig, submodules: MixerSubmodules, layer_number: int, kind: LayerKind,
                 pg_collection: Any = None, **_: Any):
        super().__init__(config)
        self.kind, self.layer_number = kind, layer_number
        self.tp_group = pg_collection.tp
        self.tp_size = self.tp_group.size()
        self.cp_group = pg_collection.cp
        self.model = config.recipe_model
        self.heads = kind.heads(self.model) // self.tp_size
        self.observer = None  # set by log.memory_health for one forward pass
        stored: dict[str, list[Parameter]] = defaultdict(list)
        for row in kind.parameters(self.model):
            stored[row.stored_in].append(row)
        self._build_projections(submodules, stored.pop("in_proj.weight"), stored.pop("out_proj.weight"))
        for name, rows in stored.items():
            setattr(self, name, self._new(rows))

    def _build_projections(self, submodules: MixerSubmodules, inputs: list[Parameter], output: list[Parameter]) -> None:
        config = self.config
        sections = self._sections(inputs)
        rows = sum(section.rows for section in sections)
        self.widths = [*(section.rows for section in sections), projection_padding(rows)]
        shared = dict(config=config, bias=False, is_expert=False, tp_group=self.tp_group)
        self.in_proj = build_module(
            submodules.in_proj, config.hidden_size, sum(self.widths) * self.tp_size, init_method=config.init_method,
            gather_output=False, skip_bias_add=False, tp_comm_buffer_name="qkv", **shared)
        # the padding is part of no section
        self.in_proj.weight.sections = sections
        self.in_proj.weight.data[rows:].zero_()
        self.out_proj = build_module(
            submodules.out_proj, output[0].shape[1], config.hidden_size, init_method=config.init_method,
            input_is_parallel=True, skip_bias_add=True, tp_comm_buffer_name="proj", **shared)
        self.out_proj.weight.sections = self._sections(output)

    def _sections(self, rows: list[Parameter]) -> tuple[Section, ...]:
        return tuple(Section(row.name, row.shape[0] // (self.tp_size if row.partition_dim == 0 else 1)) for row in rows)

    def _new(self, rows: list[Parameter]) -> nn.Parameter:
        """An uninitialised parameter for these rows of the table.

        A replicated one is used for the rank's own heads only: read it by `_shared_by_heads`.
        """
        sections, first = self._sections(rows), rows[0]
        dtype = torch.float32 if first.float32 else self.config.params_dtype
        shape = (sum(section.rows for section in sections), *first.shape[1:])
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=self.in_proj.weight.device))
        parameter.sections = sections
        if first.partition_dim is None:
            parameter.sequence_parallel = self.config.sequence_parallel
        else:
            parameter.tensor_model_parallel, parameter.partition_stride = True, 1
            parameter.partition_dim = first.partition_dim
        return parameter

    def _shared_by_heads(self, parameter: nn.Parameter) -> Tensor:
        """A replicated parameter, whose gradient is a partial sum on each tensor rank.

        Under sequence parallelism the engines all-reduce it once per step, with the norms'; otherwise the backward of
        the identity returned here does.
        """
        if self.config.sequence_parallel:
            return parameter
        return copy_to_tensor_model_parallel_region(parameter, group=self.tp_group)

    def _split_heads(self, x: Tensor, width: int) -> Tensor:
        return x.unflatten(-1, (-1, width))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,
                packed_seq_params: Documents | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S (/ tensor ranks under sequence parallel), B, D] -> the same shape, and no bias."""
        projected, _ = self.in_proj(hidden_states)
        cp = self._context_parallel(projected.shape[0], packed_seq_params)
        mixed_BSF = self.mix(projected.transpose(0, 1), packed_seq_params, cp)
        return self.out_proj(mixed_BSF.transpose(0, 1).contiguous())

    def states(self) -> dict[str, Tensor]:
        """The tensors of `LayerKind.states`, by name."""
        return {name: self.get_buffer(name) for name in self.kind.states(self.model)}

    def step_counts(self) -> Tensor | None:
        """What the training passes since the last step have counted (integers, of one shape for all layers of a kind);
        None: nothing. Ranks' counts are added up."""
        return None

    def end_step(self, counts: Tensor) -> None:
        """After a step that was made: update the states. counts: over all ranks that have this layer."""

    def _context_parallel(self, tokens: int, documents: Documents | None) -> ContextParallel | None:
        """The context-parallel shard of the rows; None where there is one context rank."""
        ranks = self.cp_group.size()
        if ranks == 1:
            return None
        shard = documents.shard if documents else SequenceShard.of_rows(tokens, self.cp_group.rank(), ranks)
        return ContextParallel(shard, self.cp_group)

    def mix(self, projected_BSF: Tensor, documents: Documents | None, cp: ContextParallel | None) -> Tensor:
        """Mix over time: the sections of every token [B, S, sum of sections] -> [B, S, H * V]."""
        raise NotImplementedError
