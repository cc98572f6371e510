"""What an HQLT mixer computes and keeps."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from hola_megatron.layers.costs import FLOAT32, Share, Term
from hola_megatron.layers.gdn.limits import CHUNK, SAVED_STATE_WIDTH

if TYPE_CHECKING:
    from hola_megatron.layers.recipe_view import ModelConfig
    from hola_megatron.layers.spec import LayerKind

LEAST_CHUNK = 16  # as in hola_kernels.hqlt.flash_window
SCALES = 8  # float32 numbers a token and head that a chunk of the rule keeps


@functools.lru_cache(maxsize=256)
def mean_visible(length: int, window: int, chunked: bool) -> float:
    """Mean over a document of `length` tokens of the tokens that a token's softmax sees."""
    if chunked:
        whole, rest = divmod(length, window)
        return (whole * window * (window + 1) / 2 + rest * (rest + 1) / 2) / length
    first = min(length, window)
    return (first * (first + 1) / 2 + (length - first) * window) / length


def forward_flops(model: ModelConfig, length: int) -> float:
    """6 H K V of the state and 2 (K + V) H P of the softmax, P the mean number of tokens that it sees."""
    heads, key, value = model.heads, model.key_dim, model.value_dim
    seen = mean_visible(length, model.hqlt.window, model.hqlt.blend == "delayed_chunk")
    return 6 * heads * key * value + 2 * (key + value) * heads * seen


def _row(share: Share) -> int:
    """Tokens of the row that the rule runs over: delayed_chunk doubles it."""
    return share.tokens * (2 if share.recipe.model.hqlt.blend == "delayed_chunk" else 1)


def _chunks(share: Share) -> int:
    return share.sequences * math.ceil(_row(share) / share.sequences / CHUNK)


def saved(share: Share, kind: LayerKind) -> list[Term]:
    """Of SiLU, the delta rule, the softmax window, the mixing and the norm."""
    model, e, tokens, heads = share.recipe.model, share.number, share.tokens, share.heads(kind)
    key, value, row = heads * model.key_dim, heads * model.value_dim, _row(share)
    gates = 1 if row == tokens else 2  # of a doubled row the rule keeps copies
    terms = [
        Term("activations", "fused projection q k v mix b", tokens * share.projection(kind) * e),
        Term("activations", "input of the output projection", tokens * value * share.product),
        Term("kernels", "q k v after SiLU", (row * (2 * key + value)) * e),
        Term("kernels", "beta and decay", 2 * row * heads * FLOAT32),
        Term("kernels", "the gates' own, inverse norms", (gates + 1) * tokens * heads * FLOAT32),
        Term("kernels", "chunk scales, U and P",
             _chunks(share) * heads * (SCALES * CHUNK * FLOAT32 + 2 * CHUNK * CHUNK * e)),
        *_window_saved(share, heads),
        Term("kernels", "outputs of the state and of the window, and small gates",
             tokens * {"sum": 0, "scalar": 2 * value + 2 * heads, "vector": 2 * value}[model.hqlt.mixing] * e),
        Term("kernels", "mixer output before its norm", tokens * value * e),
    ]
    if e == 2 and max(model.key_dim, model.value_dim) <= SAVED_STATE_WIDTH:
        states = _chunks(share) * heads * model.key_dim * model.value_dim * e
        terms.append(Term("kernels", "chunk states and residuals", states + row * value * e))
    return terms


def _window_saved(share: Share, heads: int) -> list[Term]:
    """Of rotary positions and the softmax: by flash attention in 16 bits, else in bands."""
    model, e, window = share.recipe.model, share.number, share.recipe.model.hqlt.window
    key, value = heads * model.key_dim, heads * model.value_dim
    chunked = model.hqlt.blend == "delayed_chunk"
    if e == 2 and model.key_dim == model.value_dim and not (chunked and window < LEAST_CHUNK):
        # v after SiLU in rows of its own: the rule holds a copy of both passes, or of another order
        values = value if chunked or share.interleaved else 0
        read = value if model.hqlt.mixing == "sum" else 0  # the merge does not hold it
        return [Term("kernels", "rotated q and k", share.tokens * 2 * key * e),
                Term("kernels", "v and output of the window", share.tokens * (values + read) * e),
                Term("kernels", "log-sums of the softmax", share.tokens * heads * FLOAT32)]
    banded = share.sequences * math.ceil(share.tokens / share.sequences / window) * window
    return [Term("kernels", "bands of q k v and their softmax", banded * (3 * key + 3 * value) * e),
            Term("kernels", "log-sums of the softmax", banded * heads * FLOAT32),
            Term("kernels", "cosines and sines, mask", share.tokens * model.key_dim * FLOAT32 + 2 * banded * window)]


def workspace(share: Share, kind: LayerKind) -> float:
    """Backward pass of the rule: S and dS of chunks, and gradients of a key's or a value's size at once."""
    model, e, heads = share.recipe.model, share.number, share.heads(kind)
    key, value = heads * model.key_dim, heads * model.value_dim
    states = 2 * _chunks(share) * heads * model.key_dim * model.value_dim * e
    return (states + _row(share) * (4 * key + 5 * value) * e
            + _chunks(share) * heads * (3 * CHUNK * CHUNK * e + 4 * CHUNK * FLOAT32))
