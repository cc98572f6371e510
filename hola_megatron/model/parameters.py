"""Every parameter under its public name, whatever the parallel layout.

A rank holds slices: of heads (tensor parallel), of layers (pipeline), and several logical
tensors fused into one (the input projection holds q, k, v, gate, a and b one after the
other). `pieces` undoes all of that: it lists, for each slice this rank holds, the public
name, the whole tensor's shape, and where the slice lies in it. Initialisation, counting,
checkpoints and export all use this one list, so they cannot disagree, and none of them
knows about parallelism. Public names are those of the exported Hugging Face model.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hola_megatron.config import ModelConfig

RENAME = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER_RENAME = {
    "input_layernorm.weight": "mixer_norm.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "self_attention.in_proj.weight": "mixer.{}_proj.weight",
    "self_attention.conv_weight": "mixer.{}_conv.weight",
    "self_attention.out_proj.weight": "mixer.o_proj.weight",
    "self_attention.o_norm": "mixer.o_norm.weight",
    "mlp.linear_fc1.weight": "mlp.{}_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
# one after the other, or Transformer Engine's grouped: which linear and which expert of this rank
EXPERT_NAMES = (re.compile(r"mlp\.experts\.local_experts\.(?P<at>\d+)\.(?P<linear>linear_fc\d)\.weight"),
                re.compile(r"mlp\.experts\.(?P<linear>linear_fc\d)\.weight(?P<at>\d+)"))


@dataclass(frozen=True)
class Section:
    """A logical tensor inside a fused parameter: `rows` of it on this rank, along axis 0."""

    name: str
    rows: int


@dataclass(frozen=True)
class Piece:
    """One slice of one logical tensor, held by this rank.

    The slice is `parameter.narrow(0, start, rows)` and is `whole[offset: offset + rows]` along
    `axis` of the logical tensor of `shape`. `replica`: another rank of this model copy holds the
    same slice and counts as its owner (replicated over tensor ranks, or a tied embedding's copy).
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
        """Held by one expert-parallel rank, whole."""
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
        """The slice of a tensor shaped like the parameter (the parameter itself, or optimizer state)."""
        return local.narrow(0, self.start, self.rows) if self.axis == 0 else local

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's slice of the whole logical tensor."""
        return whole.narrow(self.axis, self.offset, self._length)


def pieces(model_chunks: list[nn.Module], tensor_rank: int, tensor: int) -> list[Piece]:
    """All slices held by this rank, in a fixed order; tied embeddings appear once a rank."""
    found: list[Piece] = []
    for chunk in map(unwrapped, model_chunks):
        for name, parameter in chunk.named_parameters():
            copied = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
            found += _pieces_of(_public_name(name, chunk), parameter, copied, tensor_rank, tensor)
    return found


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The model inside what an engine wraps around it."""
    return getattr(chunk, "module", chunk)


def _public_name(name: str, chunk: nn.Module) -> str:
    if name in RENAME:
        # a pipeline's last stage holds a copy of a tied embedding under the output layer's name
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


def public_module_name(name: str, chunk: nn.Module) -> str:
    """A linear of a model chunk as checkpoints name it: model.layers.N.mixer.in_proj."""
    return _public_name(f"{name}.", chunk).removesuffix(".")


def place_name(module_name: str, chunk: nn.Module) -> str:
    """A module of a model chunk in the words of a report: the layer's number in the whole model, and the part."""
    if not module_name.startswith("decoder.layers."):
        return module_name
    _, _, local, *rest = module_name.split(".", 3)
    layer = chunk.decoder.layers[int(local)].layer_number - 1
    return ".".join([f"layer {layer}", *rest]).replace("self_attention", "mixer")


def _pieces_of(name: str, parameter: nn.Parameter, copied: bool, tensor_rank: int, tensor: int) -> Iterator[Piece]:
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
        yield Piece(name.format(section.name), parameter, start, section.rows, axis, offset, tuple(shape), replica)
        start += section.rows


@torch.no_grad()
def initialize(model_chunks: list[nn.Module], config: ModelConfig, seed: int, tensor_rank: int, tensor: int) -> None:
    """Give every parameter its start value.

    Each logical tensor is drawn whole from a generator seeded by (seed, public name), so the
    start is the same at any parallel layout. Source: method, "Initialisation as in GDN". Drawn by several threads: one
    draws 130 million numbers a second, and every tensor has its own generator.
    """
    def draw(piece: Piece) -> None:
        piece.of(piece.parameter.data).copy_(piece.cut(_start_value(piece, config, seed)))

    with ThreadPoolExecutor(_threads()) as pool:
        list(pool.map(draw, pieces(model_chunks, tensor_rank, tensor)))  # raises what a thread raised


def _threads() -> int:
    """This rank's share of the cores, at most 8: each holds a whole tensor in float32."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _start_value(piece: Piece, config: ModelConfig, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{piece.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    last = piece.name.rpartition(".")[2] if not piece.name.endswith(".weight") else piece.name.split(".")[-2]
    shape = piece.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    if last.endswith("norm") or last in ("gamma_q", "gamma_k"):
        return torch.ones(shape)
    if last == "A_log":
        return uniform(0.0, 16.0).clamp_min(1e-4).log()
    if last == "dt_bias":
        dt = uniform(math.log(1e-3), math.log(0.1)).exp().clamp_min(1e-4)
        return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
    if last == "gate":
        return torch.full(shape, config.cache.gate_init)
    if last == "sink":
        return torch.zeros(shape)
    if last.endswith("_conv"):
        return uniform(-1.0, 1.0) / math.sqrt(config.conv_width)  # as nn.Conv1d starts a depthwise convolution
    return torch.randn(shape, generator=generator) * config.init_std
