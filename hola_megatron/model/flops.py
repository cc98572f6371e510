"""Floating-point work of a token, stated once (contracts: "MFU, stated once").

    6 N_matmul + 3 * sum over layers of
        H or G layer:  2 * W (2 H K + H V)  convolution      + 6 H K V  state
        H layer also:  2 (K + V) H P        exact read
        A layer:       2 (K + V) H P_full   softmax attention, causal half
N_matmul counts each linear's weights once (output projection in, embedding look-up out; of experts those a token
goes to, and the router).
P is the mean number of visible causal pairs of a token. Forward work is tripled for the
backward. Not counted: padding, recompute, norms, selection.
"""

from __future__ import annotations

from hola_megatron.config import ModelConfig, Recipe

# dense bf16 peaks by the vendor's datasheets, TFLOP/s
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.0, "NVIDIA H200": 989.4,
               "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA A100 80GB PCIe": 312.0,
               "NVIDIA B200": 2250.0}


def matmul_parameters(model: ModelConfig) -> int:
    """Weights of all linears that a token meets, each counted once; the tied or untied output projection included."""
    width, mlp = model.hidden_size, mlp_matmul_parameters(model)
    key, value = model.heads * model.key_dim, model.heads * model.value_dim
    delta = width * (2 * key + 3 * value + model.heads * (2 if model.decay else 1))
    attention = 4 * width * width
    mixers = sum(attention if kind == "A" else delta for kind in model.layer_kinds)
    return mixers + model.layers * mlp + width * model.vocab_size


def mlp_matmul_parameters(model: ModelConfig) -> int:
    """Of one layer's MLP; with experts, of the router and the experts that a token goes to."""
    if model.moe.experts is None:
        return 3 * model.hidden_size * model.mlp_hidden_size
    return model.hidden_size * (model.moe.experts + model.moe.top_k * 3 * model.expert_hidden_size)


def mean_visible_pairs(length: int, block: int, slots: int) -> float:
    """Mean over a document of `length` tokens of: tokens of the own block up to oneself, plus cached ones."""
    total = 0
    for start in range(0, length, block):
        size = min(block, length - start)
        total += size * (size + 1) // 2 + size * min(slots, start)
    return total / length


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs (forward and backward) of one token at this document length."""
    heads, key, value = model.heads, model.key_dim, model.value_dim
    conv = 2 * model.conv_width * heads * (2 * key + value)
    state = 6 * heads * key * value
    read = 2 * (key + value) * heads * mean_visible_pairs(sequence_length, model.cache.block, model.cache.slots)
    attention = 4 * model.hidden_size * (sequence_length + 1) / 2
    forward = {"G": conv + state, "H": conv + state + read, "A": attention}
    return 6.0 * matmul_parameters(model) + 3.0 * sum(forward[kind] for kind in model.layer_kinds)


def peak_flops(device_name: str, given_tflops: float | None) -> float | None:
    """Peak FLOP/s for MFU: what the recipe gives, else the datasheet's; None for a device nobody told us about."""
    tflops = given_tflops or PEAK_TFLOPS.get(device_name)
    return tflops * 1e12 if tflops else None


def executed_flops_per_token(recipe: Recipe) -> float:
    """What the hardware does a token, for HFU: the model's work, and a second forward under full recompute."""
    useful = flops_per_token(recipe.model, recipe.train.sequence_length)
    if recipe.train.recompute == "none":
        return useful
    output = 6.0 * recipe.model.hidden_size * recipe.model.vocab_size
    return useful + (useful - output) / 3
