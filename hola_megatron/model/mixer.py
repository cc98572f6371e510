"""The token mixers of a layer as Megatron modules: HOLA, Gated DeltaNet, softmax attention.

All three are [projection of named sections] -> [mix over time, per head] -> [output
projection]. Heads are cut over tensor-parallel ranks, so nothing travels inside a mixer:
each rank owns the state and the exact cache of its heads. The fused input projection holds
its sections one after the other *per rank*; `Section` tags let checkpoints store the
logical tensors, so any tensor-parallel size loads any other. Where the sequence is cut over
context-parallel ranks, `OverRanks` says how, and `parallel.context` does what crosses the cuts.

Shapes: S tokens on this rank, B rows (1 for packed documents), D width, H heads of this
rank, K key and V value width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from hola_kernels import gated_delta_rule, gated_rms_norm, hola_attention, short_conv
from hola_kernels.gates import decay_and_strength
from hola_megatron.model.config import HolaTransformerConfig
from hola_megatron.model.documents import Documents
from hola_megatron.model.padding import projection_padding
from hola_megatron.model.parameters import Section
from hola_megatron.model.rotary import rotate
from hola_megatron.model.sections import Room, split_sections
from hola_megatron.parallel.context import (
    OverRanks,
    attention_over_ranks,
    conv_tail,
    gated_delta_over_ranks,
    hola_attention_over_ranks,
    send_conv_tail,
    start_state_exchange,
)
from hola_megatron.parallel.part import Part


@dataclass
class MixerSubmodules:
    """The linear layers a spec chooses: Megatron's own, or Transformer Engine's."""

    in_proj: Any = None
    out_proj: Any = None


class Mixer(MegatronModule):
    """What the three mixers share: fused column-parallel input, row-parallel output."""

    def __init__(self, config: HolaTransformerConfig, submodules: MixerSubmodules, layer_number: int,
                 pg_collection: Any = None, **_: Any):
        super().__init__(config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.tp_size = self.tp_group.size()
        self.cp_group = pg_collection.cp
        self.model = config.recipe_model

    def _build_projections(self, submodules: MixerSubmodules, sections: dict[str, int], width_out: int) -> None:
        """sections: rows of the fused input projection on this rank, by name; width_out: D_in of the output's."""
        config = self.config
        rows = sum(sections.values())
        self.sections = [*sections.values(), projection_padding(rows)]
        shared = dict(config=config, bias=False, is_expert=False, tp_group=self.tp_group)
        self.in_proj = build_module(
            submodules.in_proj, config.hidden_size, sum(self.sections) * self.tp_size, init_method=config.init_method,
            gather_output=False, skip_bias_add=False, tp_comm_buffer_name="qkv", **shared)
        # the padding is part of no section
        self.in_proj.weight.sections = tuple(Section(name, size) for name, size in sections.items())
        self.in_proj.weight.data[rows:].zero_()
        self.out_proj = build_module(
            submodules.out_proj, width_out * self.tp_size, config.hidden_size, init_method=config.init_method,
            input_is_parallel=True, skip_bias_add=True, tp_comm_buffer_name="proj", **shared)

    def _per_head(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """A parameter cut by head over tensor ranks, along axis 0."""
        parameter = self._parameter(*shape, dtype=dtype)
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, 0, 1
        return parameter

    def _parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        device = self.in_proj.weight.device
        return nn.Parameter(torch.empty(*shape, dtype=dtype or self.config.params_dtype, device=device))

    def _whole(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """A parameter every tensor rank holds whole but uses for its own heads only: `_shared_by_heads` reads it."""
        parameter = self._parameter(*shape, dtype=dtype)
        parameter.sequence_parallel = self.config.sequence_parallel
        return parameter

    def _shared_by_heads(self, parameter: nn.Parameter) -> Tensor:
        """Its gradient is a partial sum on each tensor rank.

        Under sequence parallelism the engines add those up once a step, with the norms'; otherwise nobody does, and
        the backward of an identity does it here.
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
        over = self._over_ranks(projected.shape[0], packed_seq_params)
        mixed_BSF = self.mix(projected.transpose(0, 1), packed_seq_params, over)
        return self.out_proj(mixed_BSF.transpose(0, 1).contiguous())

    def _over_ranks(self, tokens: int, documents: Documents | None) -> OverRanks | None:
        """How the rows go on on other ranks; None where they are whole."""
        ranks = self.cp_group.size()
        if ranks == 1:
            return None
        part = documents.part if documents else Part.of_rows(tokens, self.cp_group.rank(), ranks)
        return OverRanks(part, self.cp_group)

    def mix(self, projected_BSF: Tensor, documents: Documents | None, over: OverRanks | None) -> Tensor:
        """Mix over time: the sections of every token [B, S, sum of sections] -> [B, S, H * V]."""
        raise NotImplementedError


class DeltaMixer(Mixer):
    """Gated DeltaNet, and with `exact_cache` the HOLA mixer on top of it."""

    def __init__(self, config: HolaTransformerConfig, submodules: MixerSubmodules, layer_number: int,
                 pg_collection: Any = None, exact_cache: bool = True, **kwargs: Any):
        super().__init__(config, submodules, layer_number, pg_collection, **kwargs)
        model = self.model
        heads = model.heads // self.tp_size
        self.exact_cache = exact_cache
        self.observer = None  # set by monitor.memory_health for one forward pass
        self.key_rows, self.value_rows = heads * model.key_dim, heads * model.value_dim
        sections = {"q": self.key_rows, "k": self.key_rows, "v": self.value_rows, "g": self.value_rows, "b": heads}
        if model.decay:
            sections["a"] = heads
        self._build_projections(submodules, sections, self.value_rows)
        self.conv_weight = self._per_head(2 * self.key_rows + self.value_rows, model.conv_width)
        self.conv_weight.sections = tuple(Section(n, sections[n]) for n in ("q", "k", "v"))
        if model.decay:
            self.A_log = self._per_head(heads, dtype=torch.float32)
            self.dt_bias = self._per_head(heads, dtype=torch.float32)
        self.o_norm = self._whole(model.value_dim)
        if exact_cache:
            self.gamma_q = self._whole(model.key_dim, dtype=torch.float32)
            self.gamma_k = self._whole(model.key_dim, dtype=torch.float32)
            self.gate = self._per_head(heads, dtype=torch.float32)
            if model.cache.sink:
                self.sink = self._per_head(heads, dtype=torch.float32)

    def mix(self, projected_BSF: Tensor, documents: Documents | None, over: OverRanks | None) -> Tensor:
        model, cuts = self.model, _cuts_of(documents)
        tokens, out_gate, gate_room, maps = self._tokens(projected_BSF, cuts, over)
        if self.observer is not None:
            self.observer(self, tokens, cuts, over)
        if over is None:
            remember, keep_state, where = hola_attention, gated_delta_rule, {"cu_seqlens": cuts}
            if documents is not None:
                where["max_seqlen"] = documents.longest
        else:
            remember, keep_state = hola_attention_over_ranks, gated_delta_over_ranks
            where = {"over": over, "maps": maps}
        if self.exact_cache:
            o_BSHV = remember(**tokens, **self.cache_arguments(), **where, backend=model.backend)
        else:
            o_BSHV = keep_state(**tokens, **where, backend=model.backend)[0]
        normed = gated_rms_norm(x=o_BSHV, gate=out_gate, weight=self._shared_by_heads(self.o_norm),
                                eps=model.norm_eps, dgate_room=gate_room, backend=model.backend)
        return normed.flatten(-2)

    def _tokens(self, projected_BSF: Tensor, cuts: Tensor | None,
                over: OverRanks | None) -> tuple[dict[str, Tensor], Tensor, Room, Any]:
        """q, k, v, log_decay and beta of every token, the output gate [B, S, H, V] and the room for its gradient, and
        the states' exchange if any."""
        model, heads = self.model, self.model.heads // self.tp_size
        convolved, leaving = sum(self.sections[:3]), None
        if over is not None:  # under way while the decays are computed
            projected_BSF, leaving = send_conv_tail(projected_BSF, model.conv_width, convolved, over)
        widths = [convolved, self.sections[3], sum(self.sections[4:])]
        (qkv, gate, rest), (qkv_room, gate_room, rest_room) = split_sections(projected_BSF, widths)
        decay = {"A_log": self.A_log, "dt_bias": self.dt_bias} if model.decay else {}
        log_decay, beta = decay_and_strength(x=rest, heads=heads, **decay, dx_room=rest_room, backend=model.backend)
        before = None
        if leaving is not None:
            before = conv_tail(leaving, model.conv_width, projected_BSF.shape[0], over)
        qkv = short_conv(x=qkv, weight=self.conv_weight, cu_seqlens=cuts, tail=before, dx_room=qkv_room,
                         widths=tuple(self.sections[:3]), backend=model.backend)
        dims = {"q": model.key_dim, "k": model.key_dim, "v": model.value_dim}
        tokens = {name: self._split_heads(x, dim) for x, (name, dim) in zip(qkv, dims.items(), strict=True)}
        tokens |= {"log_decay": log_decay, "beta": beta}
        maps = None
        if over is not None:
            maps = start_state_exchange(**tokens, over=over, backend=model.backend,
                                        score=model.cache.score if self.exact_cache else None)
        return (tokens, self._split_heads(gate, model.value_dim),
                lambda: self._split_heads(gate_room(), model.value_dim), maps)

    def cache_arguments(self) -> dict[str, Any]:
        """The exact cache's parameters and choices, as hola_attention takes them."""
        cache = self.model.cache
        return {"gamma_q": self._shared_by_heads(self.gamma_q), "gamma_k": self._shared_by_heads(self.gamma_k),
                "gate": self.gate, "sink": self.sink if cache.sink else None, "block": cache.block,
                "slots": cache.slots, "score": cache.score, "read_norm": cache.read_norm}


class AttentionMixer(Mixer):
    """Causal softmax attention within documents, rotary positions counted from each document's start."""

    def __init__(self, config: HolaTransformerConfig, submodules: MixerSubmodules, layer_number: int,
                 pg_collection: Any = None, **kwargs: Any):
        super().__init__(config, submodules, layer_number, pg_collection, **kwargs)
        model = self.model
        self.head_dim = model.hidden_size // model.attention_heads
        rows = model.attention_heads // self.tp_size * self.head_dim
        self._build_projections(submodules, {"q": rows, "k": rows, "v": rows}, rows)

    def mix(self, projected_BSF: Tensor, documents: Documents | None, over: OverRanks | None) -> Tensor:
        cuts = _cuts_of(documents)
        q, k, v = (self._split_heads(x, self.head_dim) for x in projected_BSF.split(self.sections, -1)[:3])
        if self.model.rope_theta is not None:
            q, k = rotate(q, k, self.model.rope_theta, cuts, over.part.before if over else 0)
        if over is not None:
            return attention_over_ranks(q=q, k=k, v=v, over=over).flatten(-2)
        if cuts is None:
            return _causal_attention(q, k, v).flatten(-2)
        lengths = [n for n in cuts.diff().tolist() if n]
        parts = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([_causal_attention(*part) for part in parts], 1).flatten(-2)


def _cuts_of(documents: Documents | None) -> Tensor | None:
    return None if documents is None else documents.cuts


def _causal_attention(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
