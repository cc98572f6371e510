"""What a softmax attention mixer computes and keeps. Modelled is flash attention, as on a GPU in 16 bits.

Queries and keys are rotated in their place; cosines and sines are the same for all layers, and are not counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hola_megatron.layers.costs import FLOAT32, Share, Term

if TYPE_CHECKING:
    from hola_megatron.layers.recipe_view import ModelConfig
    from hola_megatron.layers.spec import LayerKind


def kv_heads(model: ModelConfig) -> int:
    """Key heads of the whole model; every query head has its own where the recipe names none."""
    return model.attention_kv_heads or model.attention_heads


def mean_visible_pairs(length: int, window: int | None) -> float:
    """Mean over a document of `length` tokens of the tokens that one sees, itself included."""
    seen = length if window is None else min(window, length)
    return (seen * (seen + 1) / 2 + (length - seen) * seen) / length


def forward_flops(model: ModelConfig, length: int, window: int | None) -> float:
    """2 (K + V) H P with P the mean number of visible tokens; without a window (T + 1) / 2, the causal half."""
    return 4 * model.hidden_size * mean_visible_pairs(length, window)


def saved(share: Share, kind: LayerKind, window: int | None) -> list[Term]:
    """Of AttentionMixer.mix: norms, rotary positions in their place, flash attention."""
    model, e, tokens = share.recipe.model, share.number, share.tokens
    tensor, context = share.recipe.parallel.tensor, share.recipe.parallel.context
    width, heads = model.hidden_size // tensor, share.heads(kind)
    keys = kv_heads(model) * kind.head_width(model) // tensor
    terms = [Term("activations", "input of the output projection", tokens * width * share.product),
             Term("kernels", "log-sums of the attention", tokens * heads * FLOAT32),
             Term("activations", "fused projection q k v", tokens * share.projection(kind) * e)]
    if model.attention_qk_norm:
        copies = width + (keys if context == 1 else 0)  # over ranks the keys are sent, not kept
        terms += [Term("kernels", "q k after their norms", tokens * copies * e),
                  Term("kernels", "inverse norms of q k", tokens * (heads + kv_heads(model) // tensor) * FLOAT32)]
    if context > 1 and window is None:
        terms.append(Term("context", "keys and values of all ranks", 2 * tokens * context * keys * e))
    elif context > 1:
        reach = share.sequences * (window - 1) if share.packed else share.recipe.train.micro_batch_size * (window - 1)
        terms.append(Term("context", "keys and values, with those of the left rank", 2 * (tokens + reach) * keys * e))
    # rows of a window, taken as documents, lie one behind the other: copies of what was not normed
    rows_in_window = share.interleaved and window is not None and window < share.longest
    if rows_in_window:
        copied = keys if model.attention_qk_norm else width + 2 * keys
        terms.append(Term("kernels", "q k v of rows one behind the other", tokens * copied * e))
    # the output has the layout of q; without flash attention, documents' outputs are concatenated
    if rows_in_window or (share.interleaved and model.attention_qk_norm) or (
            share.packed and share.number == FLOAT32 and (share.sequences > 1 or context > 1)):
        terms.append(Term("kernels", "attention output before the copy to rows", tokens * width * e))
    return terms


def workspace(share: Share, kind: LayerKind) -> float:
    """dq dk dv as the attention makes them, and the projection's gradient."""
    model, tensor = share.recipe.model, share.recipe.parallel.tensor
    width, keys = model.hidden_size // tensor, kv_heads(model) * kind.head_width(model) // tensor
    return share.tokens * 2 * (width + 2 * keys) * share.number
