"""Layer specs: which modules a layer of each kind is made of, and which layers a rank builds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import nn

from hola_megatron.model.activation import SwiGLU
from hola_megatron.model.config import HolaTransformerConfig, choose_spec
from hola_megatron.model.mixer import AttentionMixer, DeltaMixer, MixerSubmodules
from hola_megatron.model.norm import RMSNorm, RMSNormWithResidual


def block_spec(config: HolaTransformerConfig, pipeline_rank: int, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers this pipeline rank (and model chunk) builds, each of its kind, and the final norm."""
    kind, _ = choose_spec(config.recipe_model)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pipeline_rank)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pipeline_rank)
    letters = config.recipe_model.layer_kinds[first: first + count]
    experts = config.recipe_model.moe.experts
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(letter, kind, experts) for letter in letters], layer_norm=RMSNorm)


def layer_spec(letter: str, kind: str = "local", experts: int | None = None) -> ModuleSpec:
    """One layer: H HOLA, G Gated DeltaNet, A softmax attention; kind "local" or "te"; experts: None for one MLP."""
    column, row = _linears(kind)
    mixers = {"H": (DeltaMixer, {"exact_cache": True}), "G": (DeltaMixer, {"exact_cache": False}),
              "A": (AttentionMixer, {})}
    module, params = mixers[letter]
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(
        input_layernorm=RMSNormWithResidual,
        self_attention=ModuleSpec(module=module, params=params,
                                  submodules=MixerSubmodules(in_proj=column, out_proj=row)),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNormWithResidual,
        mlp=_experts(kind, experts) if experts else partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=SwiGLU)),
        mlp_bda=get_bias_dropout_add,
    ))


def _experts(kind: str, experts: int) -> Callable[..., nn.Module]:
    """Megatron's MoE layer: its experts one after the other, or Transformer Engine's grouped products."""
    if kind == "local":
        backend = LocalSpecProvider()
    else:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend = TESpecProvider()
    return get_moe_module_spec_for_backend(backend=backend, num_experts=experts, moe_grouped_gemm=kind == "te")


def _linears(kind: str) -> tuple[type, type]:
    if kind == "local":
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear
