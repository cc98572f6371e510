"""The model of a recipe, and its parameter counts."""

from __future__ import annotations

from collections import defaultdict

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import nn

from hola_megatron.layers.mixer import Section
from hola_megatron.model.config import HolaTransformerConfig, transformer_config
from hola_megatron.model.layer_specs import block_spec
from hola_megatron.model.parameters import initialize, param_shards, unwrapped
from hola_megatron.recipe.schema import Recipe


def build_model(recipe: Recipe, *, device: torch.device, seeded: bool = True) -> list[GPTModel]:
    """The model chunks of this rank (one, or `virtual_pipeline` of them), initialised unless `seeded` is off.

    Needs Megatron's process groups. device "meta" gives parameters without storage.
    """
    meta = device.type == "meta"
    config = transformer_config(recipe, on_cpu=device.type == "cpu", meta=meta)
    chunks = []
    for stage in range(recipe.parallel.virtual_pipeline):
        with torch.device("meta" if meta else "cpu" if device.type == "cpu" else device):
            chunks.append(_build_chunk(recipe, config, stage if recipe.parallel.virtual_pipeline > 1 else None))
    if seeded and not meta:
        initialize(chunks, recipe.model, recipe.train.seed, parallel_state.get_tensor_model_parallel_rank(),
                   recipe.parallel.tensor)
    return chunks


def _build_chunk(recipe: Recipe, config: HolaTransformerConfig, stage: int | None) -> GPTModel:
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, parallel_state.get_pipeline_model_parallel_rank(), stage),
        vocab_size=recipe.model.vocab_size,
        max_sequence_length=recipe.train.sequence_length,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=recipe.model.tie_embeddings,
        position_embedding_type="none",
        vp_stage=stage,
    )
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            # Transformer Engine adds weight gradients up inside its matrix products; Megatron's own output
            # projection would want apex for the same, so the common configuration leaves it off. DeepSpeed knows
            # nothing of the buffers they are added to
            module.fuse_wgrad_accumulation = recipe.engine == "megatron"
    for layer in chunk.decoder.layers:
        for weight in _gated_weights(layer.mlp):
            rows = weight.shape[0] // 2
            weight.sections = (Section("gate", rows), Section("up", rows))
    return chunk


def _gated_weights(mlp: nn.Module) -> list[nn.Parameter]:
    """The fused gate and up projections: of the one MLP, or of each expert on this rank."""
    if not hasattr(mlp, "experts"):
        return [mlp.linear_fc1.weight]
    if hasattr(mlp.experts, "local_experts"):
        return [expert.linear_fc1.weight for expert in mlp.experts.local_experts]
    return [getattr(mlp.experts.linear_fc1, f"weight{i}") for i in range(mlp.num_local_experts)]


def count_parameters(chunks: list[nn.Module]) -> dict[str, int]:
    """Whole-model parameter counts by part, from one rank that has a shard of every layer (pipeline 1).

    Parts: embedding, mixer, exact_cache, mlp, norms, output; and their total.
    """
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    counts: dict[str, int] = defaultdict(int)
    model = unwrapped(chunks[0]).config.recipe_model
    parts = {f"model.layers.{layer}.mixer.{row.name}": row.part
             for layer, kind in enumerate(model.layer_kinds) for row in kind.parameters(model)}
    for shard in param_shards(chunks, 0, ranks):
        size = 1
        for n in shard.shape:
            size *= n
        if shard.is_expert:  # the other expert-parallel ranks have as many others
            size *= parallel_state.get_expert_model_parallel_world_size()
        counts[parts.get(shard.name) or _part(shard.name)] += size
    counts["total"] = sum(counts.values())
    return dict(counts)


def _part(name: str) -> str:
    last = name.removesuffix(".weight").rpartition(".")[2]
    if name.startswith("model.embed_tokens"):
        return "embedding"
    if name.startswith("lm_head"):
        return "output"
    if last in ("mixer_norm", "mlp_norm", "norm"):
        return "norms"
    return "mlp"
