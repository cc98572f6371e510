"""Costs of a Gated DeltaProduct mixer: those of a Gated DeltaNet over a row of `delta_steps` times the tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hola_megatron.layers.costs import FLOAT32, Share, Term
from hola_megatron.layers.gdn.costs import SCALES
from hola_megatron.layers.gdn.limits import CHUNK, SAVED_STATE_WIDTH

if TYPE_CHECKING:
    from hola_megatron.layers.recipe_view import ModelConfig
    from hola_megatron.layers.spec import LayerKind


def forward_flops(model: ModelConfig) -> float:
    """2 W (H K + n H (K + V)) of the convolutions and 6 n H K V of the state."""
    heads, key, value, writes = model.heads, model.key_dim, model.value_dim, model.delta_steps
    return 2 * model.conv_width * heads * (key + writes * (key + value)) + 6 * writes * heads * key * value


def _chunks(share: Share) -> int:
    """Number of chunks of the stretched row."""
    return share.sequences * math.ceil(share.longest * share.recipe.model.delta_steps / CHUNK)


def _state_bytes(share: Share, kind: LayerKind) -> float:
    """Bytes of the states before all chunks."""
    model = share.recipe.model
    return _chunks(share) * share.heads(kind) * model.key_dim * model.value_dim * share.number


def _saves_states(share: Share) -> bool:
    model = share.recipe.model
    return share.number == 2 and max(model.key_dim, model.value_dim) <= SAVED_STATE_WIDTH


def saved(share: Share, kind: LayerKind) -> list[Term]:
    """Tensors saved by the gates, short_conv, the delta rule over the stretched row, and gated_rms_norm."""
    model, e, tokens, heads = share.recipe.model, share.number, share.tokens, share.heads(kind)
    key, value, writes = heads * model.key_dim, heads * model.value_dim, model.delta_steps
    convolved = key + writes * (key + value)
    row = tokens * writes
    terms = [
        Term("activations", "fused projection q k v gate a b", tokens * share.projection(kind) * e),
        Term("activations", "input of the output projection", tokens * value * share.product),
        Term("kernels", "q k v after convolution", tokens * convolved * e),
        Term("kernels", "q k v of the stretched row", row * (2 * key + value) * e),
        Term("kernels", "beta and decay", 4 * row * heads * FLOAT32),
        Term("kernels", "tails of the convolutions", share.sequences * (model.conv_width - 1) * convolved * e),
        Term("kernels", "chunk scales, U and P",
             _chunks(share) * heads * (SCALES * CHUNK * FLOAT32 + 2 * CHUNK * CHUNK * e)),
        Term("kernels", "mixer output before its norm", tokens * value * e),
    ]
    if _saves_states(share):
        terms.append(Term("kernels", "chunk states and residuals", _state_bytes(share, kind) + row * value * e))
    return terms


def workspace(share: Share, kind: LayerKind) -> float:
    """Bytes of the rule's backward pass over the stretched row: S and dS of all chunks, gradients of the tokens."""
    model, e, heads = share.recipe.model, share.number, share.heads(kind)
    key, value, row = heads * model.key_dim, heads * model.value_dim, share.tokens * model.delta_steps
    states = (1 if _saves_states(share) else 2) * _state_bytes(share, kind)
    return states + row * (2 * key + 4 * value) * e + _chunks(share) * heads * (
        3 * CHUNK * CHUNK * e + 4 * CHUNK * FLOAT32)
