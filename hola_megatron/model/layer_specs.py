"""Megatron layer specs: the modules of a layer of each kind, and the layers of a rank."""

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

from hola_megatron.layers.mixer import MixerSubmodules
from hola_megatron.layers.spec import LayerKind
from hola_megatron.model.activation import SwiGLU
from hola_megatron.model.config import HolaTransformerConfig, choose_spec
from hola_megatron.model.norm import RMSNorm, RMSNormWithResidual


def block_spec(config: HolaTransformerConfig, pipeline_rank: int, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers this pipeline rank (and model chunk) builds, each of its kind, and the final norm."""
    linears, _ = choose_spec(config.recipe_model)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pipeline_rank)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pipeline_rank)
    kinds = config.recipe_model.layer_kinds[first: first + count]
    experts = config.recipe_model.moe.experts
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(kind, linears, experts) for kind in kinds], layer_norm=RMSNorm)


def layer_spec(kind: LayerKind, linears: str = "local", experts: int | None = None) -> ModuleSpec:
    """One layer of a kind; linears "local" (Megatron's) or "te"; experts: None for one MLP."""
    column, row = _linears(linears)
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(
        input_layernorm=RMSNormWithResidual,
        self_attention=ModuleSpec(module=kind.mixer(), params={"kind": kind},
                                  submodules=MixerSubmodules(in_proj=column, out_proj=row)),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNormWithResidual,
        mlp=_experts(linears, experts) if experts else partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=SwiGLU)),
        mlp_bda=get_bias_dropout_add,
    ))


def _experts(linears: str, experts: int) -> Callable[..., nn.Module]:
    """Megatron's MoE layer: its experts one after the other, or Transformer Engine's grouped products."""
    if linears == "local":
        backend = LocalSpecProvider()
    else:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend = TESpecProvider()
    return get_moe_module_spec_for_backend(backend=backend, num_experts=experts, moe_grouped_gemm=linears == "te")


def _linears(linears: str) -> tuple[type, type]:
    if linears == "local":
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear
