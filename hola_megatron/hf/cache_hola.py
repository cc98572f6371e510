"""The decoding state of a HOLA model, with transformers' Cache interface. Copied into every export.

One entry per layer, of the class that the layer's kind declares: HOLA and Gated DeltaNet layers have a constant number
of bytes at any length, softmax attention layers store every token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .kinds_hola import kinds_of

# transformers' name of a model's cache, in outputs and in generate: past_key_values, since 5.24 cache
OUTPUTS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE = "cache" if "cache" in OUTPUTS else "past_key_values"


class HolaCache(Cache):
    """The states of all layers for one batch of sequences.

    config: the model's HolaConfig. `seen` counts the columns of input given so far, padding included. `graph` is the
    model's DecodingGraph over these states, with config.cuda_graph.
    """

    def __init__(self, config: Any):
        super().__init__(layers=[kind.memory() for kind in kinds_of(config)])
        self.seen, self.graph = 0, None

    def tensors(self) -> list[Tensor]:
        """Every tensor of every layer."""
        return [tensor for layer in self.layers for tensor in layer.tensors()]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input seen, padding included; the same for every layer."""
        return self.seen

    def get_mask_sizes(self, query: Any, layer_idx: int = 0) -> tuple[int, int]:
        """(length, offset) of an attention mask; `query` is a number of tokens or their positions."""
        return self.seen + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no limit."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_initialized(self) -> bool:
        return self.seen > 0

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 before the first token."""
        first = self.layers[0]
        return getattr(first, first.fields[0]).shape[0] if first.is_initialized else -1

    max_batch_size = batch_size

    def crop(self, max_length: int) -> None:
        if max_length != self.seen:
            raise NotImplementedError("the state of a HOLA model cannot be rolled back to an earlier token")

    def reset(self) -> None:
        super().reset()
        self.seen, self.graph = 0, None

    def nbytes(self) -> int:
        """Bytes of all layers' states; constant at any length without attention layers."""
        return sum(layer.nbytes() for layer in self.layers)
