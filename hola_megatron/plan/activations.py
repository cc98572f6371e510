"""Tensors that one layer saves for its backward pass, in bytes, term by term.

Every term is a tensor that an autograd function of the layer saves: Megatron's layer and linears (Transformer Engine's
save the same), hola_kernels' Triton functions, in experts Megatron's fused SwiGLU. Views share their storage, copies do
not: convolutions and output norm save slices of the fused projection and keep all of it alive. `tests/plan` counts the
storages of a real layer. Not modelled: the kernels' torch backend, which saves more (`LayerKind.kernel_problem`).

These are the terms of all layers; each layer kind adds its mixer's (layers/*/costs.py).
"""

from __future__ import annotations

from hola_megatron.layers.costs import FLOAT32, Share, Term
from hola_megatron.layers.registry import distinct
from hola_megatron.layers.spec import LayerKind

SCORE_BYTES = 12              # saved by Megatron's router per token and expert: a score, an index in a sorted list
VISIT_BYTES = 24              # of a token and chosen expert: two indices, two weights


def kernels_problem(share: Share) -> str | None:
    """Why Triton's kernels would not run, so that kernels' memory is only a lower bound; None if they do."""
    model = share.recipe.model
    if model.backend not in ("auto", "triton"):
        return f"model.backend is {model.backend}"
    return next((problem for kind in distinct(model.layer_kinds) if (problem := kind.kernel_problem(model))), None)


def saved_by_layer(share: Share, kind: LayerKind) -> list[Term]:
    """Everything a layer of this kind keeps for one micro-batch."""
    model, e = share.recipe.model, share.number
    width = model.hidden_size
    shell = [Term("activations", "residual stream before each half", 2 * share.norm_tokens * width * e),
             Term("activations", "normed inputs of both halves", 2 * share.norm_tokens * width * share.product),
             Term("activations", "inverse norms", 2 * share.norm_tokens * FLOAT32),
             *(_mlp(share) if model.moe.experts is None else _experts(share))]
    return shell + kind.saved(share)


def _mlp(share: Share) -> list[Term]:
    mlp = share.recipe.model.mlp_hidden_size // share.recipe.parallel.tensor
    return [Term("activations", "MLP gate and up", 2 * share.tokens * mlp * share.number),
            Term("activations", "MLP inner product", share.tokens * mlp * share.product)]


def _experts(share: Share) -> list[Term]:
    """Megatron's router, dispatch and experts; as many tokens come to a rank as leave it, if they are used evenly."""
    model, e = share.recipe.model, share.number
    visits = share.norm_tokens * model.moe.top_k
    return [Term("activations", "router's scores", SCORE_BYTES * share.norm_tokens * model.moe.experts),
            Term("activations", "indices and weights of routed tokens", VISIT_BYTES * visits),
            Term("activations", "inputs of experts", visits * model.hidden_size * e),
            Term("activations", "experts' gate and up", 2 * visits * model.expert_hidden_size * e),
            Term("activations", "experts' inner product", visits * model.expert_hidden_size * e)]


def layer_workspace(share: Share, kind: LayerKind) -> float:
    """Peak bytes of a layer's backward pass without saved tensors: the larger of mixer and MLP."""
    model, e, width = share.recipe.model, share.number, share.recipe.model.hidden_size
    if model.moe.experts is None:
        mlp = 3 * share.tokens * (model.mlp_hidden_size // share.recipe.parallel.tensor) * e  # gradients of its inside
    else:
        mlp = share.norm_tokens * model.moe.top_k * (3 * model.expert_hidden_size + 2 * width) * e
    stream = 2 * share.tokens * width * e  # the incoming and the outgoing gradient
    return stream + max(mlp, kind.workspace(share))
