"""Parameters counted from a recipe's shape; the built model says the same (tests/plan)."""

from __future__ import annotations

from dataclasses import dataclass

from hola_megatron.config import ModelConfig, Recipe
from hola_megatron.model.padding import projection_padding, projection_rows


@dataclass(frozen=True)
class LayerParameters:
    """Numbers of one layer. cut: split over tensor ranks; whole: on each of them; float32: kept so in bf16 models.

    mlp is cut; where there are experts it is zero, the router is whole and the experts go round expert-parallel ranks.
    """

    mixer_cut: int
    mixer_whole: int
    mlp: int
    router: int
    experts: int
    norms: int
    cache_cut: int
    cache_whole: int
    mixer_float32: int

    @property
    def mixer(self) -> int:
        return self.mixer_cut + self.mixer_whole

    @property
    def exact_cache(self) -> int:
        return self.cache_cut + self.cache_whole


def layer_parameters(model: ModelConfig, kind: str) -> LayerParameters:
    """One layer of a kind (H, G or A)."""
    width = model.hidden_size
    norms, count = 2 * width, model.moe.experts
    inside = (3 * width * model.mlp_hidden_size, 0, 0) if count is None else \
        (0, width * count, count * 3 * width * model.expert_hidden_size)
    if kind == "A":
        return LayerParameters(4 * width * width, 0, *inside, norms, 0, 0, 0)
    key, value = model.heads * model.key_dim, model.heads * model.value_dim
    scalars = 2 * model.heads if model.decay else 0  # A_log, dt_bias
    projections = width * (2 * key + 3 * value + model.heads * (2 if model.decay else 1))
    convolution = (2 * key + value) * model.conv_width
    cache_cut = model.heads * (2 if model.cache.sink else 1) if kind == "H" else 0  # read gate, sink
    cache_whole = 2 * model.key_dim if kind == "H" else 0  # gamma_q, gamma_k
    return LayerParameters(projections + convolution + scalars, model.value_dim, *inside, norms, cache_cut, cache_whole,
                           scalars)


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Whole-model parameters: embedding, mixer, exact_cache, mlp, norms, output; and their total."""
    table = model.vocab_size * model.hidden_size
    layers = [layer_parameters(model, kind) for kind in model.layer_kinds]
    counts = {"embedding": table, "mixer": sum(x.mixer for x in layers),
              "exact_cache": sum(x.exact_cache for x in layers),
              "mlp": sum(x.mlp + x.router + x.experts for x in layers),
              "norms": sum(x.norms for x in layers) + model.hidden_size, "output": 0 if model.tie_embeddings else table}
    return {**counts, "total": sum(counts.values())}


def active_parameters(model: ModelConfig) -> int:
    """Those that one token meets: of each layer's experts only the chosen."""
    total, moe = parameters_by_part(model)["total"], model.moe
    if moe.experts is None:
        return total
    idle = sum(layer_parameters(model, kind).experts for kind in model.layer_kinds) // moe.experts
    return total - idle * (moe.experts - moe.top_k)


def rank_products(recipe: Recipe, stage: int) -> int:
    """Weights of the layers' linears on a rank of this stage, padding too: what fp8 quantizes, and Muon moves."""
    model, ranks = recipe.model, recipe.parallel.tensor
    kinds = stage_layers(recipe, stage)
    padding = sum(projection_padding(projection_rows(model, kind, ranks)) for kind in kinds) * model.hidden_size
    return padding + sum(layer_products(model, kind) for kind in kinds) // ranks


def layer_products(model: ModelConfig, kind: str) -> int:
    """Weights of one layer's linears: of the mixer and of the MLP, without experts and router."""
    mixed = model.hidden_size if kind == "A" else model.heads * model.value_dim
    inside = 3 * model.mlp_hidden_size if model.moe.experts is None else 0
    return (projection_rows(model, kind, 1) + mixed + inside) * model.hidden_size


@dataclass(frozen=True)
class RankParameters:
    """Numbers one rank holds, padding too. narrow: in the recipe's precision; float32: always so (decay, gates).

    experts: those of `narrow` that are shared over expert-parallel ranks.
    """

    narrow: int
    float32: int
    experts: int

    @property
    def total(self) -> int:
        return self.narrow + self.float32


def stage_layers(recipe: Recipe, stage: int) -> str:
    """The layer kinds of one pipeline stage, all its model chunks."""
    parallel, kinds = recipe.parallel, recipe.model.layer_kinds
    size = len(kinds) // (parallel.pipeline * parallel.virtual_pipeline)
    starts = [(chunk * parallel.pipeline + stage) * size for chunk in range(parallel.virtual_pipeline)]
    return "".join(kinds[start: start + size] for start in starts)


def rank_parameters(recipe: Recipe, stage: int) -> RankParameters:
    """What a rank of this pipeline stage holds: a tied embedding twice where first and last stage differ."""
    model, ranks, stages = recipe.model, recipe.parallel.tensor, recipe.parallel.pipeline
    table = model.vocab_size * model.hidden_size // ranks
    narrow = float32 = experts = 0
    for kind in stage_layers(recipe, stage):
        layer = layer_parameters(model, kind)
        narrow += (layer.mixer_cut - layer.mixer_float32 + layer.mlp) // ranks + layer.mixer_whole + layer.norms
        experts += layer.experts // recipe.parallel.expert
        narrow += layer.router + layer.experts // recipe.parallel.expert
        narrow += projection_padding(projection_rows(model, kind, ranks)) * model.hidden_size
        float32 += (layer.mixer_float32 + layer.cache_cut) // ranks + layer.cache_whole
    if stage == 0:
        narrow += table
    if stage == stages - 1:
        narrow += model.hidden_size + (0 if model.tie_embeddings and stages == 1 else table)
    return RankParameters(narrow, float32, experts)
