"""What a HOLA model remembers between calls, behind transformers' Cache interface.

One entry a layer. H and G layers keep a constant number of bytes at any length: the last
W - 1 inputs of the convolution, the compressed state and, in H layers, w exact tokens and
the block not yet full. A (softmax attention) layers keep every token, as anywhere.
Everything is detached: no gradient flows from one call to an earlier one.

Shapes: N sequences, T tokens of a call, S tokens so far, H heads, K and V head widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

try:
    from hola_kernels import HolaState
except ImportError:  # the same code, bundled with the export
    from .hola_ops import HolaState


class LayerMemory:
    """What the layers' memories share: tensors with the sequences on axis 0, or None before the first token."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    fields: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        for name in self.fields:
            setattr(self, name, None)

    @property
    def is_initialized(self) -> bool:
        return getattr(self, self.fields[0]) is not None

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by change(tensor)."""
        for name in self.fields:
            held = getattr(self, name)
            if isinstance(held, HolaState):
                held = HolaState(**{key: change(value) for key, value in vars(held).items()})
            elif held is not None:
                held = change(held)
            setattr(self, name, held)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences `beam_idx`, in that order."""
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, _: int) -> None:
        raise NotImplementedError("a HOLA memory cannot be rolled back: what it forgot is gone")

    def get_max_cache_shape(self) -> int:
        return -1

    get_max_length = get_max_cache_shape

    def nbytes(self) -> int:
        """Bytes held."""
        sizes: list[int] = []
        self.map(lambda x: sizes.append(x.nbytes) or x)
        return sum(sizes)


class DeltaMemory(LayerMemory):
    """Of an H or G layer.

    q_tail, k_tail [N, W - 1, H K], v_tail [N, W - 1, H V]: the last inputs of the convolutions
    state: the HolaState of an H layer; float32 [N, H, K, V] of a G layer
    """

    fields = ("q_tail", "k_tail", "v_tail", "state")


class AttentionMemory(LayerMemory):
    """Of an A layer: keys (rotated) [N, H, S, K], values [N, H, S, K], and which of them are tokens [N, S]."""

    fields = ("keys", "values", "valid")

    def append(self, keys: Tensor, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take T more tokens ([N, H, T, K] and [N, T]); returns all of them."""
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
            valid = torch.cat([self.valid, valid], 1)
        self.keys, self.values, self.valid = keys.detach(), values.detach(), valid
        return keys, values, valid


class HolaCache(Cache):
    """The memories of all layers of one batch of sequences.

    config: the model's HolaConfig. `seen` counts the columns of input given so far, padding included. `graph` is the
    model's DecodingGraph over these memories, where config.cuda_graph asks for one.
    """

    def __init__(self, config: Any):
        super().__init__(layers=[AttentionMemory() if kind == "A" else DeltaMemory() for kind in config.layer_kinds])
        self.seen, self.graph = 0, None

    def held(self) -> list[Tensor]:
        """Every tensor of every layer."""
        found: list[Tensor] = []
        for layer in self.layers:
            for value in (getattr(layer, name) for name in layer.fields):
                found += vars(value).values() if isinstance(value, HolaState) else [] if value is None else [value]
        return found

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
        """Sequences held; -1 before the first token."""
        first = self.layers[0]
        return getattr(first, first.fields[0]).shape[0] if first.is_initialized else -1

    max_batch_size = batch_size

    def crop(self, max_length: int) -> None:
        if max_length != self.seen:
            raise NotImplementedError("a HOLA memory cannot be rolled back: what it forgot is gone")

    def reset(self) -> None:
        super().reset()
        self.seen, self.graph = 0, None

    def nbytes(self) -> int:
        """Bytes held by all layers; constant at any length without A layers."""
        return sum(layer.nbytes() for layer in self.layers)
