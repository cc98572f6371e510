"""Costs of a HOLA mixer's exact cache, in addition to those of a Gated DeltaNet."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from hola_megatron.layers.costs import FLOAT32, Share, Term

if TYPE_CHECKING:
    from hola_megatron.layers.recipe_view import CacheConfig, ModelConfig
    from hola_megatron.layers.spec import LayerKind


def reach(cache: CacheConfig) -> int | None:
    """Tokens of the sliding window that is the local part (CacheOptions.reach); None: the block."""
    return {"block": None, "window": cache.window, "none": 1}[cache.local]


def window_blocks(cache: CacheConfig) -> int:
    """Full blocks before a token's own that its sliding window reaches into (CacheOptions.window_blocks)."""
    window = reach(cache)
    return 0 if window is None else -(-(window - 1) // cache.block)


@functools.lru_cache(maxsize=256)
def mean_visible_pairs(length: int, block: int, slots: int, window: int | None = None) -> float:
    """Mean number of tokens that a token attends to (local part and cache), over a document of `length` tokens.

    window: tokens of a sliding window; None: the block. Cached tokens are counted outside the window: how many of them
    lie in it depends on the text.
    """
    total = 0
    for start in range(0, length, block):
        size = min(block, length - start)
        if window is None:
            total += size * (size + 1) // 2 + size * min(slots, start)
        else:
            total += sum(min(window, t + 1) + min(slots, start, max(t + 1 - window, 0))
                         for t in range(start, start + size))
    return total / length


def read_flops(model: ModelConfig, length: int) -> float:
    """2 (K + V) H P, with P the mean number of tokens that a token attends to."""
    pairs = mean_visible_pairs(length, model.cache.block, model.cache.slots, reach(model.cache))
    return 2 * (model.key_dim + model.value_dim) * model.heads * pairs


def _blocks(share: Share) -> int:
    """Number of cache blocks of a rank's sequences."""
    return share.sequences * math.ceil(share.longest / share.recipe.model.cache.block)


def read_saved(share: Share, kind: LayerKind) -> list[Term]:
    """Tensors saved by selection and cache attention."""
    tokens, heads, cache = share.tokens, share.heads(kind), share.recipe.model.cache
    joined = [Term("kernels", "attention output before it is added",
                   tokens * heads * share.recipe.model.value_dim * share.number)]
    return [*(joined if share.recipe.model.rule != "none" else []),
            Term("kernels", "log-sums and norms of the attention", 3 * tokens * heads * FLOAT32),
            Term("kernels", "cached rows of every block", _blocks(share) * heads * cache.slots * 4)]


def saved_unfused(share: Share, kind: LayerKind) -> list[Term]:
    """What is kept where state and cache attention are operations of their own, merged after it; or the latter alone.

    Rotary positions are torch's: bytes of a number that autograd keeps besides 16-bit inputs
    (tests/plan/test_unfused_bytes.py measures them).
    """
    model, tokens, heads, merge = share.recipe.model, share.tokens, share.heads(kind), share.recipe.model.cache.merge
    gates = 2 * heads if merge == "two" else 0
    terms = []
    if model.rule != "none":
        terms.append(Term("kernels", "output of the state, and gates of two",
                          tokens * (heads * model.value_dim + gates) * share.number))
    if merge == "convex" and share.interleaved:  # nothing else keeps the projection; the gates are a section of it
        terms.append(Term("kernels", "projection", tokens * share.projection(kind) * share.number))
    if model.cache.rope_theta is not None:
        rotated = 9 if model.cache.read_norm == "none" else 17
        terms.append(Term("kernels", "q and k at their positions", tokens * heads * model.key_dim * rotated))
    return terms


def read_saved_over_ranks(share: Share, kind: LayerKind) -> list[Term]:
    """The incomplete block and the cached tokens received from earlier context-parallel ranks."""
    model, e, heads = share.recipe.model, share.number, share.heads(kind)
    key, value = heads * model.key_dim, heads * model.value_dim
    rows = 1 if share.packed else share.recipe.train.micro_batch_size
    open_tokens = 0 if share.longest % model.cache.block == 0 else model.cache.block - 1
    open_tokens += window_blocks(model.cache) * model.cache.block
    slots = model.cache.slots
    size = rows * (open_tokens + slots) * ((key + value) * e + heads * FLOAT32)
    size += rows * slots * heads * 12  # indices of exchanged tokens: a 32-bit row and a 64-bit candidate
    size += rows * open_tokens * (2 * value * e + 2 * heads * FLOAT32)  # outputs and norms of carried tokens, unused
    return [Term("context", "open block and cached tokens from other ranks", size)]


def read_workspace(share: Share, kind: LayerKind) -> float:
    """Bytes of the attention's backward pass: probabilities of pairs, gradients of cached tokens, dq dk, dv do."""
    model, e, heads = share.recipe.model, share.number, share.heads(kind)
    cache, blocks = model.cache, _blocks(share)
    tiles = math.ceil(cache.slots / 64) + math.ceil((1 + window_blocks(cache)) * cache.block / 64)
    pairs = blocks * heads * math.ceil(cache.block / 64) * 64 * tiles * (2 * 64 * e + FLOAT32)
    sums = blocks * heads * cache.slots * (model.key_dim + model.value_dim) * e
    return share.tokens * (2 * heads * model.key_dim + 2 * heads * model.value_dim) * e + pairs + sums
