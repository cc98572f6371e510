"""A recipe's model as Megatron-core's TransformerConfig, with the fields a HOLA layer adds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.transformer_config import TransformerConfig

from hola_megatron.config import ModelConfig, Recipe
from hola_megatron.errors import RecipeError


@dataclass
class HolaTransformerConfig(TransformerConfig):
    """TransformerConfig plus the recipe's model section, which the mixers read."""

    recipe_model: ModelConfig | None = field(default=None)


def choose_spec(model: ModelConfig) -> tuple[str, str]:
    """("local" or "te", why): what `model.layer_spec` means on this machine."""
    usable = HAVE_TE and torch.cuda.is_available()
    if model.layer_spec == "te" and not usable:
        raise RecipeError("model.layer_spec: te needs Transformer Engine and a CUDA device; install the extra "
                          "hola-megatron[te], or set model.layer_spec=local")
    if model.layer_spec != "auto":
        return model.layer_spec, "named by the recipe"
    if usable:
        return "te", "Transformer Engine is installed"
    return "local", "no CUDA device" if not torch.cuda.is_available() else "Transformer Engine is not installed"


def transformer_config(recipe: Recipe, *, on_cpu: bool, meta: bool = False) -> HolaTransformerConfig:
    """Everything Megatron needs to know. `meta`: parameters without storage (counting, planning)."""
    model, train, parallel = recipe.model, recipe.train, recipe.parallel
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    full = train.recompute == "full"
    on_te = choose_spec(model)[0] == "te"
    has_attention = "A" in model.layer_kinds
    heads = model.attention_heads if has_attention else model.heads
    return HolaTransformerConfig(
        recipe_model=model,
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=heads,
        kv_channels=model.hidden_size // model.attention_heads if has_attention else model.key_dim,
        ffn_hidden_size=model.mlp_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=not (on_cpu or meta),
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
