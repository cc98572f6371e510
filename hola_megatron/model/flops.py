"""FLOPs of a token.

    6 N_matmul + 3 * sum over layers of LayerKind.forward_flops (layers/*/costs.py), for instance
        gdn and hola:  2 * W (2 H K + H V)  convolution      + 6 H K V  state
        hola also:     2 (K + V) H P        cache attention
        attention:     2 (K + V) H P_full   softmax attention, causal half
N_matmul counts each linear's weights once (output projection in, embedding look-up out; of experts those a token
goes to, and the router).
P is the mean number of visible causal pairs of a token. Forward work is tripled for the
backward. Not counted: padding, recompute, norms, selection.
"""

from __future__ import annotations

from hola_megatron.layers.registry import distinct
from hola_megatron.recipe.schema import ModelConfig, Recipe

# dense bf16 peaks by the vendor's datasheets, TFLOP/s
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.0, "NVIDIA H200": 989.4,
               "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA A100 80GB PCIe": 312.0,
               "NVIDIA B200": 2250.0}


def matmul_parameters(model: ModelConfig) -> int:
    """Weights of all linears that a token uses, each counted once; the tied or untied output projection included."""
    mixers = sum(row.size for kind in model.layer_kinds for row in kind.parameters(model) if row.is_linear)
    return mixers + model.layers * mlp_matmul_parameters(model) + model.hidden_size * model.vocab_size


def mlp_matmul_parameters(model: ModelConfig) -> int:
    """Of one layer's MLP; with experts, of the router and of a token's experts."""
    if model.moe.experts is None:
        return 3 * model.hidden_size * model.mlp_hidden_size
    return model.hidden_size * (model.moe.experts + model.moe.top_k * 3 * model.expert_hidden_size)


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs (forward and backward) of one token at this document length."""
    forward = {kind: kind.forward_flops(model, sequence_length) for kind in distinct(model.layer_kinds)}
    return 6.0 * matmul_parameters(model) + 3.0 * sum(forward[kind] for kind in model.layer_kinds)


def peak_flops(device_name: str, given_tflops: float | None) -> float | None:
    """Peak FLOP/s for MFU: the recipe's value, else the datasheet's; None for an unknown device."""
    tflops = given_tflops or PEAK_TFLOPS.get(device_name)
    return tflops * 1e12 if tflops else None


def executed_flops_per_token(recipe: Recipe) -> float:
    """Executed FLOPs per token, for HFU: the model's, and a second forward pass under full recompute."""
    useful = flops_per_token(recipe.model, recipe.train.sequence_length)
    if recipe.train.recompute == "none":
        return useful
    output = 6.0 * recipe.model.hidden_size * recipe.model.vocab_size
    return useful + (useful - output) / 3
