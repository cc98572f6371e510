"""Every parameter under its public name, independent of the parallel layout.

A rank has shards: of heads (tensor parallel), of layers (pipeline), and fused parameters that concatenate several
logical tensors (the input projection: q, k, v, gate, a and b). `param_shards` lists, for each shard of this rank, the
public name, the logical tensor's shape and the shard's offset. Initialisation, counting, checkpoints and export use
this list only, so they are consistent and independent of parallelism. Public names are those of the exported Hugging
Face model.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hola_megatron.layers.initial import normal, ones
from hola_megatron.layers.mixer import Section
from hola_megatron.layers.spec import Initial, Parameter
from hola_megatron.recipe.schema import ModelConfig

RENAME = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER_RENAME = {
    "input_layernorm.weight": "mixer_norm.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "mlp.linear_fc1.weight": "mlp.{}_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
# one after the other, or Transformer Engine's grouped: which linear and which expert of this rank
EXPERT_NAMES = (re.compile(r"mlp\.experts\.local_experts\.(?P<at>\d+)\.(?P<linear>linear_fc\d)\.weight"),
                re.compile(r"mlp\.experts\.(?P<linear>linear_fc\d)\.weight(?P<at>\d+)"))


@dataclass(frozen=True)
class ParamShard:
    """A shard of one logical tensor on this rank.

    The shard is `parameter.narrow(0, start, rows)`, and `[offset: offset + rows]` along `axis` of the logical tensor of
    `shape`. `replica`: another rank of this model copy owns the same shard (replicated over tensor ranks, or a copy of
    a tied embedding).
    """

    name: str
    parameter: nn.Parameter
    start: int
    rows: int
    axis: int
    offset: int
    shape: tuple[int, ...]
    replica: bool

    @property
    def is_expert(self) -> bool:
        """Whether it is an expert's: whole on one expert-parallel rank."""
        return ".mlp.experts." in self.name

    @property
    def local_shape(self) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.axis] = self._length
        return tuple(shape)

    @property
    def _length(self) -> int:
        return self.rows if self.axis == 0 else self.parameter.shape[self.axis]

    def of(self, local: Tensor) -> Tensor:
        """The shard of a tensor shaped like the parameter (the parameter itself, or optimizer state), a view."""
        return local.narrow(0, self.start, self.rows) if self.axis == 0 else local

    def slice(self, whole: Tensor) -> Tensor:
        """This rank's shard of the whole logical tensor, a view."""
        return whole.narrow(self.axis, self.offset, self._length)


def param_shards(model_chunks: list[nn.Module], tensor_rank: int, tensor: int) -> list[ParamShard]:
    """All shards of this rank, in a fixed order; a tied embedding appears once per rank."""
    found: list[ParamShard] = []
    for chunk in map(unwrapped, model_chunks):
        for name, parameter in chunk.named_parameters():
            copied = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
            found += _shards_of(_parameter_name(name, chunk), parameter, copied, tensor_rank, tensor)
    return found


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The model without the engine's wrapper."""
    return getattr(chunk, "module", chunk)


def _public_name(name: str, chunk: nn.Module) -> str:
    if name in RENAME:
        # a pipeline's last stage has a copy of a tied embedding under the output layer's name
        tied = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
        return RENAME["embedding.word_embeddings.weight" if tied else name]
    _, _, local, rest = name.split(".", 3)  # decoder.layers.N.rest
    layer = chunk.decoder.layers[int(local)].layer_number - 1
    if match := next(filter(None, (pattern.fullmatch(rest) for pattern in EXPERT_NAMES)), None):
        number = chunk.decoder.layers[int(local)].mlp.local_expert_indices[int(match["at"])]
        rest = f"mlp.{match['linear']}.weight"
        return f"model.layers.{layer}.{LAYER_RENAME[rest]}".replace(".mlp.", f".mlp.experts.{number}.")
    short = LAYER_RENAME.get(rest, rest.replace("self_attention.", "mixer."))
    return f"model.layers.{layer}.{short}"


def _parameter_name(name: str, chunk: nn.Module) -> str:
    """The public name, with {} where the sections of a fused parameter put theirs."""
    public = _public_name(name, chunk)
    layer, mixer, _ = public.partition(".mixer.")
    return f"{layer}{mixer}{{}}" if mixer else public  # a mixer's sections have their whole names (layers/spec.py)


def public_module_name(name: str, chunk: nn.Module) -> str:
    """A linear of a model chunk as checkpoints name it: model.layers.N.mixer.in_proj."""
    return _public_name(f"{name}.", chunk).removesuffix(".")


def module_label(module_name: str, chunk: nn.Module) -> str:
    """A module of a model chunk as named in reports: the layer's number in the whole model, and the submodule."""
    if not module_name.startswith("decoder.layers."):
        return module_name
    _, _, local, *rest = module_name.split(".", 3)
    layer = chunk.decoder.layers[int(local)].layer_number - 1
    return ".".join([f"layer {layer}", *rest]).replace("self_attention", "mixer")


def _shards_of(name: str, parameter: nn.Parameter, copied: bool, tensor_rank: int, tensor: int) -> Iterator[ParamShard]:
    is_expert = ".mlp.experts." in name  # whole, and by its marks cut over tensor ranks as any linear's weight
    split = getattr(parameter, "tensor_model_parallel", False) and tensor > 1 and not is_expert
    axis = parameter.partition_dim if split else 0
    rank, ranks = (tensor_rank, tensor) if split else (0, 1)
    replica = copied or (not split and not is_expert and tensor_rank > 0)
    sections = getattr(parameter, "sections", None) or (Section("", parameter.shape[0]),)
    start = 0
    for section in sections:
        shape = [section.rows, *parameter.shape[1:]]
        offset = rank * shape[axis]
        shape[axis] *= ranks
        yield ParamShard(name.format(section.name), parameter, start, section.rows, axis, offset, tuple(shape), replica)
        start += section.rows


@torch.no_grad()
def initialize(model_chunks: list[nn.Module], config: ModelConfig, seed: int, tensor_rank: int, tensor: int) -> None:
    """Set every parameter's initial value.

    Each logical tensor is drawn whole from a generator seeded by (seed, public name), so the
    start is the same at any parallel layout. Source: method, "Initialisation as in GDN". Drawn by several threads: one
    draws 130 million numbers a second, and every tensor has its own generator.
    """
    initials = initial_functions(config)

    def draw(shard: ParamShard) -> None:
        shard.of(shard.parameter.data).copy_(initial_value(shard, initials, config, seed))

    with ThreadPoolExecutor(_threads()) as pool:
        list(pool.map(draw, param_shards(model_chunks, tensor_rank, tensor)))  # raises what a thread raised


def _threads() -> int:
    """Threads for this rank, at most 8: each allocates a whole tensor in float32."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def initial_value(shard: ParamShard, initials: dict[str, Initial], config: ModelConfig, seed: int) -> Tensor:
    """This rank's shard of a tensor's initial value, float32 on the CPU. initials: `initial_functions`."""
    digest = hashlib.sha256(f"{seed}/{shard.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    initial = initials.get(shard.name, ones if shard.name.endswith("norm.weight") else normal)
    return shard.slice(initial(shard.shape, generator, config))


def initial_functions(config: ModelConfig) -> dict[str, Initial]:
    """Initialisation of the mixers' tensors, by public name; other norms are one, other matrices normal."""
    return {name: row.init for name, row in _mixer_rows(config)}


def exact_cache_names(config: ModelConfig) -> set[str]:
    """Public names of the exact caches' tensors: a checkpoint without caches lacks these alone."""
    projections = {f"model.layers.{layer}.mixer.{name}_proj.weight"
                   for layer, kind in enumerate(config.layer_kinds) for name in kind.further_projections(config)}
    return projections | {name for name, row in _mixer_rows(config) if row.part == "exact_cache"}


def _mixer_rows(config: ModelConfig) -> Iterator[tuple[str, Parameter]]:
    for layer, kind in enumerate(config.layer_kinds):
        for row in kind.parameters(config):
            yield f"model.layers.{layer}.mixer.{row.name}", row
