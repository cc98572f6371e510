"""Parameter counts from a recipe's sizes, equal to those of the built model (tests/plan)."""

from __future__ import annotations

from dataclasses import dataclass

from hola_megatron.layers.padding import projection_padding, projection_rows
from hola_megatron.layers.spec import LayerKind
from hola_megatron.recipe.schema import ModelConfig, Recipe


@dataclass(frozen=True)
class LayerParameters:
    """Parameter counts of one layer. sharded: over tensor ranks; whole: replicated; float32: so in bf16 models as well.

    mlp is sharded. With experts it is zero, the router is whole and experts are sharded over expert-parallel ranks.
    """

    mixer_sharded: int
    mixer_whole: int
    mlp: int
    router: int
    experts: int
    norms: int
    cache_sharded: int
    cache_whole: int
    mixer_float32: int

    @property
    def mixer(self) -> int:
        return self.mixer_sharded + self.mixer_whole

    @property
    def exact_cache(self) -> int:
        return self.cache_sharded + self.cache_whole


def layer_parameters(model: ModelConfig, kind: LayerKind) -> LayerParameters:
    """One layer of a kind."""
    width, count = model.hidden_size, model.moe.experts
    inside = (3 * width * model.mlp_hidden_size, 0, 0) if count is None else \
        (0, width * count, count * 3 * width * model.expert_hidden_size)
    rows = kind.parameters(model)

    def total(part: str, is_sharded: bool, float32_only: bool = False) -> int:
        return sum(row.size for row in rows if row.part == part and (row.partition_dim is not None) == is_sharded
                   and (row.float32 or not float32_only))

    return LayerParameters(total("mixer", True), total("mixer", False), *inside, 2 * width, total("exact_cache", True),
                           total("exact_cache", False), total("mixer", True, float32_only=True))


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
    """Parameters that one token uses: of every layer's experts only the routed ones."""
    total, moe = parameters_by_part(model)["total"], model.moe
    if moe.experts is None:
        return total
    idle = sum(layer_parameters(model, kind).experts for kind in model.layer_kinds) // moe.experts
    return total - idle * (moe.experts - moe.top_k)


def rank_products(recipe: Recipe, stage: int) -> int:
    """Weights of the layers' linears on a rank of this stage, padding included: fp8 quantizes, Muon updates them."""
    model, ranks = recipe.model, recipe.parallel.tensor
    kinds = stage_layers(recipe, stage)
    padding = sum(projection_padding(projection_rows(kind, model, ranks)) for kind in kinds) * model.hidden_size
    return padding + sum(layer_products(model, kind) for kind in kinds) // ranks


def layer_products(model: ModelConfig, kind: LayerKind) -> int:
    """Weights of one layer's linears: of the mixer and of the MLP, without experts and router."""
    mixer = sum(row.size for row in kind.parameters(model) if row.is_linear)
    return mixer + (3 * model.mlp_hidden_size * model.hidden_size if model.moe.experts is None else 0)


@dataclass(frozen=True)
class RankParameters:
    """Parameter counts of one rank, padding included.

    compute_dtype: in the recipe's precision. float32: always float32 (decay, gates). experts: those of `compute_dtype`
    that are sharded over expert-parallel ranks.
    """

    compute_dtype: int
    float32: int
    experts: int

    @property
    def total(self) -> int:
        return self.compute_dtype + self.float32


def stage_layers(recipe: Recipe, stage: int) -> tuple[LayerKind, ...]:
    """The layer kinds of one pipeline stage, all its model chunks."""
    parallel, kinds = recipe.parallel, recipe.model.layer_kinds
    size = len(kinds) // (parallel.pipeline * parallel.virtual_pipeline)
    starts = [(chunk * parallel.pipeline + stage) * size for chunk in range(parallel.virtual_pipeline)]
    return tuple(kind for start in starts for kind in kinds[start: start + size])


def rank_parameters(recipe: Recipe, stage: int) -> RankParameters:
    """Of a rank of this pipeline stage. A tied embedding counts twice where first and last stage differ."""
    model, ranks, stages = recipe.model, recipe.parallel.tensor, recipe.parallel.pipeline
    table = model.vocab_size * model.hidden_size // ranks
    compute_dtype = float32 = experts = 0
    for kind in stage_layers(recipe, stage):
        layer = layer_parameters(model, kind)
        sharded = layer.mixer_sharded - layer.mixer_float32 + layer.mlp
        compute_dtype += sharded // ranks + layer.mixer_whole + layer.norms
        experts += layer.experts // recipe.parallel.expert
        compute_dtype += layer.router + layer.experts // recipe.parallel.expert
        compute_dtype += projection_padding(projection_rows(kind, model, ranks)) * model.hidden_size
        float32 += (layer.mixer_float32 + layer.cache_sharded) // ranks + layer.cache_whole
    if stage == 0:
        compute_dtype += table
    if stage == stages - 1:
        compute_dtype += model.hidden_size + (0 if model.tie_embeddings and stages == 1 else table)
    return RankParameters(compute_dtype, float32, experts)
