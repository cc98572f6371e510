"""A recipe's model as Megatron-core's TransformerConfig, with the fields a HOLA layer adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.transformer_config import TransformerConfig

from hola_megatron.errors import RecipeError
from hola_megatron.recipe.schema import ModelConfig, Recipe


@dataclass
class HolaTransformerConfig(TransformerConfig):
    """TransformerConfig plus the recipe's model section, which the mixers read."""

    recipe_model: ModelConfig | None = field(default=None)


def choose_spec(model: ModelConfig) -> tuple[str, str]:
    """("local" or "te", reason): the layer spec in use on this machine."""
    usable = HAVE_TE and torch.cuda.is_available()
    if model.layer_spec == "te" and not usable:
        raise RecipeError("model.layer_spec: te needs Transformer Engine and a CUDA device; install the extra "
                          "hola-megatron[te], or set model.layer_spec=local")
    if model.layer_spec != "auto":
        return model.layer_spec, "named by the recipe"
    if usable:
        return "te", "Transformer Engine is installed"
    return "local", "no CUDA device" if not torch.cuda.is_available() else "Transformer Engine is not installed"


# our names for Megatron's, and the number format each is used with
FP8_RECIPES = {"delayed": ("delayed", "hybrid"), "current": ("tensorwise", "hybrid"),
               "blockwise": ("blockwise", "e4m3")}


def check_fp8(recipe: Recipe) -> None:
    """RecipeError where this machine does not support the recipe's fp8 products."""
    wanted = recipe.fp8.recipe
    if wanted is None:
        return
    spec, why = choose_spec(recipe.model)
    if spec != "te":
        raise RecipeError(f"fp8.recipe: {wanted} needs Transformer Engine and a CUDA device ({why}); install the extra "
                          "hola-megatron[te], or set fp8.recipe=null")
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as state

    fine, reason = (state.is_fp8_block_scaling_available if wanted == "blockwise" else state.is_fp8_available)()
    if not fine:
        raise RecipeError(f"fp8.recipe: {wanted} does not run on {torch.cuda.get_device_name()} "
                          f"({' '.join(reason.split())}); set fp8.recipe=null")


def _experts(recipe: Recipe, on_te: bool) -> dict[str, Any]:
    """Megatron's options for model.moe; empty without experts."""
    model, moe = recipe.model, recipe.model.moe
    if moe.experts is None:
        return {}
    by_bias = moe.balancing == "bias"
    return {
        "num_moe_experts": moe.experts, "moe_router_topk": moe.top_k, "moe_ffn_hidden_size": model.expert_hidden_size,
        "moe_router_load_balancing_type": "aux_loss" if moe.balancing == "aux_loss" else "none",
        "moe_aux_loss_coeff": moe.aux_loss_weight if moe.balancing == "aux_loss" else 0.0,
        "moe_router_score_function": "sigmoid" if by_bias else "softmax", "moe_router_enable_expert_bias": by_bias,
        "moe_router_bias_update_rate": moe.bias_rate, "moe_router_dtype": "fp32",
        # the scores of the chosen add up to one; a single one's would always be one, and teach the router nothing
        "moe_router_pre_softmax": moe.top_k == 1 and not by_bias,
        "moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": on_te, "moe_permute_fusion": on_te,
        "expert_model_parallel_size": recipe.parallel.expert, "expert_tensor_parallel_size": 1}


def transformer_config(recipe: Recipe, *, on_cpu: bool, meta: bool = False) -> HolaTransformerConfig:
    """The TransformerConfig of a recipe. `meta`: parameters without storage (counting, planning)."""
    model, train, parallel = recipe.model, recipe.train, recipe.parallel
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    full = train.recompute == "full"
    on_te = choose_spec(model)[0] == "te"
    if not meta:
        check_fp8(recipe)
    fp8_recipe, fp8_format = FP8_RECIPES[recipe.fp8.recipe or "delayed"]
    first = model.layer_kinds[0]  # Megatron knows one number of heads; our mixers know their own
    return HolaTransformerConfig(
        **_experts(recipe, on_te),
        recipe_model=model,
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=first.heads(model),
        kv_channels=first.head_width(model),
        ffn_hidden_size=model.mlp_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        # one MLP: the activation that layer_specs names; experts keep Megatron's, which weighs tokens as well
        use_te_activation_func=model.moe.experts is None,
        bias_activation_fusion=model.moe.experts is not None and not (on_cpu or meta),
        cross_entropy_loss_fusion=on_te,
        cross_entropy_fusion_impl="te",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        perform_initialization=False,  # parameters.initialize does it, the same at any layout
        use_cpu_initialization=on_cpu or meta,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bf16",
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        fp8=fp8_format if recipe.fp8.recipe and not meta else None,
        fp8_recipe=fp8_recipe,
        fp8_amax_history_len=recipe.fp8.amax_history,
        fp8_amax_compute_algo="max",
        first_last_layers_bf16=bool(recipe.fp8.first_layers_bf16 or recipe.fp8.last_layers_bf16),
        num_layers_at_start_in_bf16=recipe.fp8.first_layers_bf16,
        num_layers_at_end_in_bf16=recipe.fp8.last_layers_bf16,
        gradient_accumulation_fusion=False,  # build.py turns it on for Transformer Engine's linears
        calculate_per_token_loss=True,
        recompute_granularity="full" if full else None,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        deallocate_pipeline_outputs=True,
        # with two stages an interleaved schedule sends activations and gradients between the same two
        # ranks; batched together they are matched by order, and silently swapped
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
    )
