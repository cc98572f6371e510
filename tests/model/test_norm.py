"""The norms of layers: with the residual they give Megatron's layer the numbers it had without."""

from __future__ import annotations

import pytest
import torch
from helpers import MICRO

from hola_megatron.config import build_recipe
from hola_megatron.layers.hola import HOLA
from hola_megatron.model.layer_specs import layer_spec
from hola_megatron.model.norm import RMSNorm, RMSNormWithResidual
from hola_megatron.startup.start import start


def built(precision: str, **model):
    from hola_megatron.model.build import build_model

    made = build_recipe({**MICRO, "model": {**MICRO["model"], "layers": 1, **model},
                         "train": {**MICRO["train"], "precision": precision}})
    start(made)
    return build_model(made, device=torch.device("cpu"))[0].decoder


def output_and_gradients(layer, x):
    x = x.clone().requires_grad_()
    y, _ = layer(hidden_states=x, attention_mask=None)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, layer.input_layernorm.weight, layer.pre_mlp_layernorm.weight], weight)]


@pytest.mark.parametrize("model", [{"pattern": "H"}, {"pattern": "A"},
                                   {"pattern": "G", "moe": {"experts": 4, "hidden_size": 32, "top_k": 2}}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layer_is_what_it_was_without_the_residual(precision, model):
    layer, = built(precision, **model).layers
    x = torch.randn(64, 2, 32, generator=torch.Generator().manual_seed(1)).to(layer.input_layernorm.weight.dtype)
    found = output_and_gradients(layer, x)
    for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
        assert type(norm) is RMSNormWithResidual and norm(x)[1] is x
        norm.__class__ = RMSNorm  # Megatron's layer then goes on with its own input
    for have, want in zip(found, output_and_gradients(layer, x), strict=True):
        assert torch.equal(have, want)


def test_the_final_norm_returns_one_tensor_and_the_recipes_backend_runs():
    norm = built("fp32", backend="reference").final_layernorm
    assert type(norm) is RMSNorm and norm.backend == "reference"
    assert isinstance(norm(torch.ones(1, 2, 32)), torch.Tensor)


@pytest.mark.parametrize("kind", ["local", "te"])
def test_both_kinds_of_layers_have_them(kind):
    parts = layer_spec(HOLA, kind).submodules
    assert parts.input_layernorm is parts.pre_mlp_layernorm is RMSNormWithResidual
