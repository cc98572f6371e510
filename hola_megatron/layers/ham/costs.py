"""What a HAM mixer's exact read computes and keeps, in addition to those of a Gated DeltaNet.

The share of kept tokens is the recipe's: how many a head keeps is known in training only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hola_megatron.layers.costs import FLOAT32, Share, Term

if TYPE_CHECKING:
    from hola_megatron.layers.recipe_view import ModelConfig
    from hola_megatron.layers.spec import LayerKind


def mean_visible(length: int, share: float) -> float:
    """Mean over a document of `length` tokens of the tokens that a token reads: itself, and `share` of those before."""
    return 1 + share * (length - 1) / 2


def read_flops(model: ModelConfig, length: int) -> float:
    """2 (K + V) H P, with P the mean number of tokens read; of a learned router its outer products 2 H R."""
    read = 2 * (model.key_dim + model.value_dim) * model.heads * mean_visible(length, model.ham.share)
    return read + (2 * model.heads * model.ham.router_width if model.ham.router == "learned" else 0)


def read_saved(share: Share, kind: LayerKind) -> list[Term]:
    """Tensors saved by the norms of q and k, the router, the exact read and the merging."""
    model, e, tokens, heads = share.recipe.model, share.number, share.tokens, share.heads(kind)
    key, value = heads * model.key_dim, heads * model.value_dim
    terms = [
        Term("kernels", "q and k of the exact read", tokens * 2 * key * e),
        Term("kernels", "output of the exact read", tokens * value * e),
        Term("kernels", "log-sums and lists of kept tokens", 3 * tokens * heads * FLOAT32),
        Term("kernels", "output of the state and the gates of both reads", tokens * (value + 2 * heads) * e),
    ]
    if model.ham.router == "learned":
        inner = heads * model.ham.router_width
        copies = 2 if e == 2 else 1  # before and after SiLU; in float32 what is before it lies in the projection
        terms.append(Term("kernels", "learned router", tokens * (copies * inner + 3 * heads) * FLOAT32))
        if share.interleaved and e != 2:  # where nothing else keeps the projection, the router's section of it does
            terms.append(Term("kernels", "projection", tokens * share.projection(kind) * e))
    return terms


def read_workspace(share: Share, kind: LayerKind) -> float:
    """Bytes of the read's backward pass: gradients of q k v and of the output, and of keys and values again."""
    model, e, heads = share.recipe.model, share.number, share.heads(kind)
    return share.tokens * (4 * heads * model.key_dim + 4 * heads * model.value_dim) * e
