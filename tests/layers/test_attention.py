"""Softmax attention layers, whole and in a window, against one masked softmax in float64: forward and every gradient.

The definition is written out here: projections, norm of queries and keys, rotary positions by complex numbers, a mask
over all pairs of tokens, grouped key heads. Megatron's mixer and the exported layer must both give it.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import MICRO
from torch import Tensor, nn

from hola_kernels import PackedDocuments
from hola_kernels.softmax_attention.flash_documents import WIDEST
from hola_megatron.config import ModelConfig, Recipe, build_recipe
from hola_megatron.errors import RecipeError
from hola_megatron.layers.attention import ATTENTION
from hola_megatron.layers.attention.limits import FLASH_WIDTH
from hola_megatron.layers.documents import Documents
from hola_megatron.layers.exported.packing_hola import Packing
from hola_megatron.layers.registry import kind_named
from hola_megatron.startup.start import start

CUTS = (0, 1, 30, 30, 31, 96)
MODELS = {
    "plain": {"pattern": "A"}, "no_positions": {"pattern": "A", "rope_theta": None},
    "grouped": {"pattern": "A", "attention_kv_heads": 2}, "one_key_head": {"pattern": "A", "attention_kv_heads": 1},
    "normed": {"pattern": "A", "attention_kv_heads": 2, "attention_qk_norm": True},
    "window": {"pattern": "W", "attention_window": 7},
    "narrowest": {"pattern": "W", "attention_window": 1},
    "wider_than_documents": {"pattern": "W", "attention_window": 200},
    "all": {"pattern": "W", "attention_window": 20, "attention_kv_heads": 1, "attention_qk_norm": True},
    "normed_no_positions": {"pattern": "W", "attention_window": 33, "attention_qk_norm": True, "rope_theta": None},
}


def recipe_of(**model) -> Recipe:
    return build_recipe({**MICRO, "model": {**MICRO["model"], "layers": 1, "attention_heads": 4, "rope_theta": 100.0,
                                            **model}})


def defined(model: ModelConfig, weights: dict[str, Tensor], x_TD: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """[T, D] -> [T, D]: one packed row."""
    window = {"A": math.inf, "W": model.attention_window}[model.pattern]
    heads, width = model.attention_heads, model.hidden_size // model.attention_heads
    tokens = len(x_TD)
    document = torch.tensor([max(n for n, start in enumerate(cuts[:-1]) if start <= t and cuts[n + 1] > t)
                             for t in range(tokens)])
    position = torch.arange(tokens) - torch.tensor(cuts)[document]

    def heads_of(name: str) -> Tensor:
        x = (x_TD @ weights[f"{name}_proj.weight"].t()).unflatten(-1, (-1, width))
        if model.attention_qk_norm and name in "qk":
            x = x / (x.square().mean(-1, keepdim=True) + model.norm_eps).sqrt() * weights[f"{name}_norm.weight"]
        if model.rope_theta is not None and name in "qk":
            half = torch.arange(width // 2, dtype=torch.float64)
            angle = position[:, None].double() * model.rope_theta ** (-2 * half / width)
            a, b = x.chunk(2, -1)
            turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, None]
            x = torch.cat([turned.real, turned.imag], -1)
        return x

    q, k, v = (heads_of(name) for name in "qkv")
    back = position[:, None] - position
    seen = (document[:, None] == document) & (back >= 0) & (back < window)
    read = []
    for h in range(heads):
        g = h * k.shape[1] // heads
        scores = q[:, h] @ k[:, g].t() / math.sqrt(width)
        read.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, g])
    return torch.cat(read, -1) @ weights["o_proj.weight"].t()


def lively(recipe: Recipe) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {row.name: ((1 + 0.5 * torch.randn(row.shape, generator=g)) if len(row.shape) == 1
                       else 0.4 * torch.randn(row.shape, generator=g)).double().requires_grad_()
            for row in recipe.model.layer_kinds[0].parameters(recipe.model)}


def inputs(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(tokens, width, generator=g, dtype=torch.float64) for _ in range(2))


def wanted(recipe: Recipe, cuts: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients by name: of the input ("x") and of every weight."""
    weights, (x, dy) = lively(recipe), inputs(cuts[-1], recipe.model.hidden_size)
    x = x.requires_grad_()
    y = defined(recipe.model, weights, x, cuts)
    found = torch.autograd.grad(y, [x, *weights.values()], dy)
    return y, dict(zip(["x", *weights], found, strict=True))


def compare(y: Tensor, gradients: dict[str, Tensor], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(y, want[0], rtol=1e-9, atol=1e-9)
    assert gradients.keys() == want[1].keys()
    for name, exact in want[1].items():
        torch.testing.assert_close(gradients[name], exact, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def mixer_of(recipe: Recipe) -> nn.Module:
    from hola_megatron.model.build import build_model

    start(recipe)
    return build_model(recipe, device=torch.device("cpu"))[0].decoder.layers[0].self_attention.double()


@torch.no_grad()
def fill(mixer: nn.Module, weights: dict[str, Tensor]) -> None:
    for parameter in mixer.parameters():
        at = 0
        for section in parameter.sections:
            parameter[at: at + section.rows] = weights[section.name]
            at += section.rows


def gradients_of(mixer: nn.Module) -> dict[str, Tensor]:
    found = {}
    for parameter in mixer.parameters():
        parts = parameter.grad[: sum(s.rows for s in parameter.sections)].split([s.rows for s in parameter.sections])
        found |= {section.name: part for section, part in zip(parameter.sections, parts, strict=True)}
        assert parameter.grad[sum(s.rows for s in parameter.sections):].eq(0).all()  # rows of padding
    return found


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_the_mixer_is_the_definition(name, backend):
    recipe = recipe_of(**MODELS[name], backend=backend)
    mixer = mixer_of(recipe)
    fill(mixer, lively(recipe))
    for cuts in (CUTS, (0, 96)):
        x, dy = inputs(cuts[-1], recipe.model.hidden_size)
        x = x[:, None].requires_grad_()
        documents = None if len(cuts) == 2 else \
            Documents.of(PackedDocuments(torch.tensor(cuts, dtype=torch.int32)))
        mixer.zero_grad()
        y, _ = mixer(x, None, documents)
        y.backward(dy[:, None])
        compare(y[:, 0], {"x": x.grad[:, 0], **gradients_of(mixer)}, wanted(recipe, cuts))


@pytest.mark.parametrize("name", ["plain", "all"])
def test_rows_and_bounded_documents(name):
    """Two rows of one document each; and cuts whose last documents are empty, as a CUDA graph has them."""
    recipe = recipe_of(**MODELS[name])
    mixer = mixer_of(recipe)
    fill(mixer, lively(recipe))
    x, _ = inputs(96, recipe.model.hidden_size)
    want = wanted(recipe, (0, 48, 96))[0]
    y, _ = mixer(x.view(2, 48, -1).transpose(0, 1).contiguous(), None, None)
    torch.testing.assert_close(y.transpose(0, 1).flatten(0, 1), want, rtol=1e-9, atol=1e-9)
    documents = Documents.of(PackedDocuments(torch.tensor([0, 48, 96, 96, 96]), 64))
    y, _ = mixer(x[:, None].clone(), None, documents)
    torch.testing.assert_close(y[:, 0], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_the_exported_layer_is_the_definition(name):
    from hola_megatron.hf.shape import config_of

    recipe = recipe_of(**MODELS[name])
    layer = kind_named(recipe.model.pattern).exported().mixer(config_of(recipe)).double()
    layer.load_state_dict({name: x.detach() for name, x in lively(recipe).items()})
    for cuts in (CUTS, (0, 96)):
        x, dy = inputs(cuts[-1], recipe.model.hidden_size)
        x = x[None].requires_grad_()
        packing = Packing.of(None, x, {"cu_seqlens": torch.tensor(cuts)}, 0)
        layer.zero_grad()
        y = layer(x, packing, None)
        y.backward(dy[None])
        gradients = {n: p.grad for n, p in layer.named_parameters()}
        compare(y[0], {"x": x.grad[0], **gradients}, wanted(recipe, cuts))


@torch.no_grad()
def test_the_window_s_memory_is_a_ring_of_its_last_tokens():
    from hola_megatron.hf.shape import config_of

    recipe = recipe_of(**MODELS["window"])
    kind = kind_named("W").exported()
    layer, memory = kind.mixer(config_of(recipe)).double(), kind.memory()
    x, _ = inputs(30, recipe.model.hidden_size)
    layer(x[None, :10], None, memory)
    address = memory.keys.data_ptr()
    for t in range(10, 30):
        layer(x[None, t: t + 1], None, memory)
    assert memory.keys.shape == (1, 4, 7, 8) and memory.length.tolist() == [30]
    assert memory.keys.data_ptr() == address  # one token at a time writes in place
    values = layer.v_proj(x[23:30]).unflatten(-1, (4, 8))
    for t in range(23, 30):
        torch.testing.assert_close(memory.values[0, :, t % 7], values[t - 23])


def test_old_runs_have_the_same_parameters_and_flops():
    model = recipe_of(pattern="A").model
    assert [row.name for row in ATTENTION.parameters(model)] == [f"{n}_proj.weight" for n in "qkvo"]
    assert ATTENTION.forward_flops(model, 100) == 4 * model.hidden_size * 101 / 2
    window = recipe_of(pattern="W", attention_window=10).model
    seen = sum(min(t + 1, 10) for t in range(100))
    kind = window.layer_kinds[0]
    assert kind.forward_flops(window, 100) == pytest.approx(4 * window.hidden_size * seen / 100, rel=1e-12)
    assert kind.forward_flops(window, 7) == ATTENTION.forward_flops(window, 7) and not kind.memory_grows


@pytest.mark.parametrize(("changes", "said"), [
    ({"model": {"attention_kv_heads": 3}}, "model.attention_kv_heads: 3 does not divide model.attention_heads = 4"),
    ({"model": {"attention_kv_heads": 1}, "parallel": {"tensor": 2}},
     r"model.attention_kv_heads: 1 is not a multiple of 2 \(parallel.tensor = 2 shards heads\)"),
    ({"model": {"attention_window": 34}, "parallel": {"context": 2}, "train": {"micro_batch_size": 1}},
     r"2 ranks get 32 tokens each of a row of 64 .* and need 33 \(.*model.attention_window - 1"),
    ({"train": {"cuda_graph": True}}, "train.cuda_graph: true needs train.precision of bf16 .* where sliding-window"),
    ({"model": {"hidden_size": 24}, "train": {"cuda_graph": True, "precision": "bf16"}},
     "attention heads of a multiple of 8 up to 256, and model.hidden_size / model.attention_heads is 6"),
    ({"model": {"attention_window": 0}}, "model.attention_window: 0"),
    ({"model": {"attention_kv_heads": 0}}, "model.attention_kv_heads: 0")])
def test_what_does_not_go_together_is_named(changes, said):
    values = {**MICRO, "model": {**MICRO["model"], "pattern": "W", "attention_heads": 4}}
    with pytest.raises(RecipeError, match=said):
        build_recipe({**values, **{name: {**values.get(name, {}), **change} for name, change in changes.items()}})


@pytest.mark.parametrize("changes", [{}, {"data": {"documents": "joined"}}], ids=str)
def test_a_graph_takes_attention_over_documents_in_16_bits(changes):
    train = {**MICRO["train"], "cuda_graph": True, "precision": "bf16"}
    model = {**MICRO["model"], "pattern": "AW", "attention_heads": 4}
    data = {**MICRO["data"], **changes.get("data", {})}
    assert build_recipe({**MICRO, "model": model, "train": train, "data": data}).train.cuda_graph
    joined = {**MICRO["data"], "documents": "joined"}
    wide = {**model, "pattern": "A", "hidden_size": 24}  # rows of equal length need no flash attention
    assert build_recipe({**MICRO, "model": wide, "train": {**train, "precision": "fp32"}, "data": joined})


def test_limits_are_those_of_the_kernels():
    assert FLASH_WIDTH == WIDEST


def test_fewer_key_heads_are_fewer_parameters():
    whole, grouped = (recipe_of(pattern="A", attention_kv_heads=n).model for n in (None, 1))
    count = [sum(row.size for row in ATTENTION.parameters(model)) for model in (whole, grouped)]
    assert count == [4 * 32 * 32, 2 * 32 * 32 + 2 * 8 * 32]
    assert dataclasses.replace(whole, attention_kv_heads=4).attention_kv_heads == 4
