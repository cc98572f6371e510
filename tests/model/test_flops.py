"""The FLOP formula behind MFU against operations that are counted while they run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hola_megatron.config import ModelConfig, load_recipe
from hola_megatron.layers.hola import HOLA
from hola_megatron.layers.spec import LayerKind
from hola_megatron.model.flops import flops_per_token, matmul_parameters
from hola_megatron.startup.start import start

RECIPES = Path(__file__).parent.parent.parent / "recipes"


def tensor(*size: int) -> torch.Tensor:
    return torch.empty(*size, device="meta", requires_grad=True)


def counted(model: ModelConfig, kind: LayerKind, length: int) -> float:
    """FLOPs a token of one layer, forward and backward, of the plain definition: every product is a torch operation.

    Nothing is computed (meta tensors), but everything is called: for every token of every head its state's three
    products, its taps, and the read over exactly the tokens that it sees, counted one by one.
    """
    heads, key, value, width = model.heads, model.key_dim, model.value_dim, model.hidden_size
    channels, each = heads * (2 * key + value), heads * length
    of_a_state = () if model.rule == "none" else (heads, heads)
    with FlopCounterMode(display=False) as counter:
        products = [tensor(length, width) @ tensor(width, rows) for rows in (
            channels, heads * value, *of_a_state, model.mlp_hidden_size, model.mlp_hidden_size)]
        products += [tensor(length, heads * value) @ tensor(heads * value, width),
                     tensor(length, model.mlp_hidden_size) @ tensor(model.mlp_hidden_size, width)]
        products += [tensor(channels, length, model.conv_width) @ tensor(channels, model.conv_width, 1)]
        if of_a_state:
            products += [tensor(each, 1, key) @ tensor(each, key, value),   # what the state says of k
                         tensor(each, key, 1) @ tensor(each, 1, value),     # the correction is written
                         tensor(each, 1, key) @ tensor(each, key, value)]   # q reads
        if kind is HOLA:
            block, slots = model.cache.block, model.cache.slots
            for seen, tokens in Counter(t % block + 1 + min(slots, t // block * block) for t in range(length)).items():
                products += [tensor(heads * tokens, 1, key) @ tensor(heads * tokens, key, seen),
                             tensor(heads * tokens, 1, seen) @ tensor(heads * tokens, seen, value)]
        sum(product.sum() for product in products).backward()
    return counter.get_total_flops() / length


def counted_attention(model: ModelConfig, window: int | None, length: int) -> float:
    """The same of a softmax attention layer: every token of every head reads what it sees."""
    heads, width = model.attention_heads, model.hidden_size
    keys, each = (model.attention_kv_heads or heads) * width // heads, width // heads
    with FlopCounterMode(display=False) as counter:
        products = [tensor(length, width) @ tensor(width, rows)
                    for rows in (width, keys, keys, width, model.mlp_hidden_size, model.mlp_hidden_size)]
        products += [tensor(length, model.mlp_hidden_size) @ tensor(model.mlp_hidden_size, width)]
        for seen, tokens in Counter(min(t + 1, window or length) for t in range(length)).items():
            products += [tensor(heads * tokens, 1, each) @ tensor(heads * tokens, each, seen),
                         tensor(heads * tokens, 1, seen) @ tensor(heads * tokens, seen, each)]
        sum(product.sum() for product in products).backward()
    return counter.get_total_flops() / length


def counted_head(model: ModelConfig, length: int = 8) -> float:
    with FlopCounterMode(display=False) as counter:
        (tensor(length, model.hidden_size) @ tensor(model.hidden_size, model.vocab_size)).sum().backward()
    return counter.get_total_flops() / length


@pytest.mark.parametrize("length", [1, 63, 300])
@pytest.mark.parametrize("words", ["model.pattern=GH", "model.pattern=H model.rule=none model.cache.score=recency"])
def test_the_formula_is_what_a_plain_model_does(words, length):
    model = load_recipe(RECIPES / "hola_tiny.yaml", ["model.cache.block=64", *words.split()]).model
    by_hand = sum(counted(model, kind, length) for kind in model.layer_kinds) + counted_head(model)
    assert flops_per_token(model, length) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("length", [1, 63, 300])
@pytest.mark.parametrize("changes", [[], ["model.attention_kv_heads=2"]], ids=str)
def test_attention_whole_and_in_a_window(changes, length):
    model = load_recipe(RECIPES / "hola_tiny.yaml", ["model.layers=2", "model.pattern=AW", "model.attention_heads=4",
                                                     "model.attention_window=64", *changes]).model
    by_hand = counted_head(model) + sum(counted_attention(model, window, length) for window in (None, 64))
    assert flops_per_token(model, length) == pytest.approx(by_hand, rel=1e-12)


def test_340m_at_2048_tokens_counted():
    model = load_recipe(RECIPES / "hola_340m.yaml").model
    by_hand = model.layers * counted(model, HOLA, 2048) + counted_head(model)
    assert by_hand == pytest.approx(2.37e9, rel=2e-3)
    assert flops_per_token(model, 2048) == pytest.approx(by_hand, rel=1e-9)


def test_the_built_model_multiplies_what_the_formula_says():
    """A real training step of the whole model: its plain matrix products are 6 N_matmul a token, and its padding's."""
    from hola_megatron.engine.megatron import MegatronEngine
    from hola_megatron.profile.profiler import _synthetic

    recipe = load_recipe(RECIPES / "hola_tiny.yaml", ["train.global_batch_size=1", "train.micro_batch_size=1"])
    layout = start(recipe)
    engine = MegatronEngine(recipe, layout)
    with FlopCounterMode(display=False) as counter:
        engine.train_step(_synthetic(recipe, layout), 1e-3)
    fused = [layer.self_attention.in_proj.weight for layer in engine.model[0].module.decoder.layers]
    padding = sum(weight.shape[0] - sum(section.rows for section in weight.sections) for weight in fused)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    multiplied = matmul_parameters(recipe.model) + padding * recipe.model.hidden_size
    assert products == 6 * multiplied * recipe.tokens_per_step
