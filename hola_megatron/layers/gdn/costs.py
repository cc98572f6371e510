"""Costs of a Gated DeltaNet mixer: FLOPs, saved tensors, workspace, messages.

Not modelled: the kernels' torch backend, which saves more (`LayerKind.kernel_problem`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hola_megatron.layers.costs import FLOAT32, Share, Term
from hola_megatron.layers.gdn.limits import CHUNK, SAVED_STATE_WIDTH

if TYPE_CHECKING:
    from hola_megatron.layers.recipe_view import ModelConfig
    from hola_megatron.layers.spec import LayerKind

SCALES = 8                        # float32 values saved per token and head
MULTIPROCESSORS = 132             # of an H100 or H200: the number of concurrent programs decides where sequences split
SPLIT_GAIN, LEAST_SPAN = 2.5, 16  # when hola_kernels splits a sequence, and the minimum of chunks per span


def forward_flops(model: ModelConfig) -> float:
    """2 W (2 H K + H V) of the convolution and 6 H K V of a state (chunked form, counted as the recurrence)."""
    heads, key, value = model.heads, model.key_dim, model.value_dim
    state = 0 if model.rule == "none" else 6 * heads * key * value
    return 2 * model.conv_width * heads * (2 * key + value) + state


def chunks(share: Share) -> int:
    """Number of chunks of a rank's sequences."""
    return share.sequences * math.ceil(share.longest / CHUNK)


def spans(share: Share, kind: LayerKind) -> int:
    """Number of spans of all sequences; 0 where none is split."""
    model = share.recipe.model
    tile = 128 if model.value_dim > 64 and share.number == 2 else 64
    at_once = max(MULTIPROCESSORS // (share.heads(kind) * max(model.value_dim // tile, 1)), 1)
    longest = math.ceil(share.longest / CHUNK)
    span = max(math.ceil(chunks(share) / at_once), LEAST_SPAN)
    return share.sequences * math.ceil(longest / span) if longest > SPLIT_GAIN * span else 0


def saved_states(share: Share, kind: LayerKind) -> float:
    """Bytes of the chunk states that a layer's forward pass saves."""
    model = share.recipe.model
    if share.number != 2 or max(model.key_dim, model.value_dim) > SAVED_STATE_WIDTH:
        return 0.0
    return chunks(share) * share.heads(kind) * model.key_dim * model.value_dim * share.number


def late(share: Share, kind: LayerKind) -> list[Term]:
    """What a delayed state keeps besides: the moved queries, or the doubled row of q, k, v, beta and decay."""
    model, e, tokens, heads = share.recipe.model, share.number, share.tokens, share.heads(kind)
    if not model.state_delay:
        return []
    key, value = heads * model.key_dim, heads * model.value_dim
    if model.state_delay_mode == "stream":
        return [Term("kernels", "queries moved forward", tokens * key * e)]
    chunk = heads * (SCALES * CHUNK * FLOAT32 + 2 * CHUNK * CHUNK * e)
    return [Term("kernels", "doubled row of the delayed state",
                 2 * tokens * ((2 * key + value) * e + 2 * heads * FLOAT32) + chunks(share) * chunk)]


def saved(share: Share, kind: LayerKind) -> list[Term]:
    """Tensors saved by short_conv and gated_rms_norm, and of a state by the gates and the delta rule."""
    model, e, tokens, heads = share.recipe.model, share.number, share.tokens, share.heads(kind)
    key, value = heads * model.key_dim, heads * model.value_dim
    if share.interleaved:  # the convolutions save copies; the projection is not saved
        projected = Term("kernels", "inputs of the convolutions", tokens * (2 * key + value) * e)
    else:
        projected = Term("activations", "fused projection q k v gate a b", tokens * share.projection(kind) * e)
    terms = [
        projected,
        Term("activations", "input of the output projection", tokens * value * share.product),
        Term("kernels", "q k v after convolution", tokens * (2 * key + value) * e),
        Term("kernels", "tails of the convolutions", share.sequences * (model.conv_width - 1) * (2 * key + value) * e),
        Term("kernels", "mixer output before its norm", tokens * value * e),
    ]
    if share.interleaved:
        terms.append(Term("kernels", "output gate as rows of a head", tokens * value * e))
    return terms if model.rule == "none" else terms + saved_by_rule(share, kind)


def saved_by_rule(share: Share, kind: LayerKind) -> list[Term]:
    """Tensors saved by the gates and the delta rule."""
    model, e, tokens, heads = share.recipe.model, share.number, share.tokens, share.heads(kind)
    terms = [
        Term("kernels", "beta and decay", 2 * tokens * heads * FLOAT32),
        Term("kernels", "chunk scales, U and P",
             chunks(share) * heads * (SCALES * CHUNK * FLOAT32 + 2 * CHUNK * CHUNK * e)),
    ]
    if saved_states(share, kind):
        size = saved_states(share, kind) + tokens * heads * model.value_dim * e
        terms.append(Term("kernels", "chunk states and residuals", size))
    if spans(share, kind):
        maps = spans(share, kind) * heads * model.key_dim * (model.value_dim + model.key_dim) * FLOAT32
        terms.append(Term("kernels", "maps (transposed) and initial states of spans", maps))
    return terms + late(share, kind)


def saved_over_ranks(share: Share, kind: LayerKind) -> list[Term]:
    """Additional tensors saved under context parallelism, for one document over all ranks (hola_megatron/parallel)."""
    model, heads = share.recipe.model, share.heads(kind)
    key, ranks = heads * model.key_dim, share.recipe.parallel.context
    return [Term("context", "maps of the ranks in between", max(ranks - 2, 0) * key * model.key_dim * FLOAT32),
            Term("context", "initial states", share.sequences * key * model.value_dim * FLOAT32)]


def workspace(share: Share, kind: LayerKind, keys: int = 2, values: int = 4) -> float:
    """Bytes of the rule's backward pass: S and dS of all chunks, and gradients of the tokens.

    keys, values: how many tensors of a key's and of a value's size are alive at once (dq dk; dv dr do, and e unless it
    was saved).
    """
    model, e, heads = share.recipe.model, share.number, share.heads(kind)
    key, value, from_forward = heads * model.key_dim, heads * model.value_dim, saved_states(share, kind)
    states = 2 * chunks(share) * heads * model.key_dim * model.value_dim * e - from_forward
    values -= from_forward > 0
    return (states + share.tokens * (keys * key + values * value) * e
            + chunks(share) * heads * (3 * CHUNK * CHUNK * e + 4 * CHUNK * FLOAT32))


def messages(share: Share, kind: LayerKind) -> float:
    """Bytes of all context-parallel ranks' state maps and state gradients."""
    model = share.recipe.model
    width = 2 * model.value_dim + model.key_dim
    return share.recipe.parallel.context * share.heads(kind) * model.key_dim * width * FLOAT32
