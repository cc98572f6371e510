"""The MLP's activation: ours in its place, the numbers of Megatron's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import MICRO

from hola_megatron.config import build_recipe
from hola_megatron.model.activation import SwiGLU
from hola_megatron.startup.start import start


def built(precision: str, model: dict | None = None):
    from hola_megatron.model.build import build_model

    made = build_recipe({**MICRO, "model": {**MICRO["model"], "layers": 1, "pattern": "G", **(model or {})},
                         "train": {**MICRO["train"], "precision": precision}})
    start(made)
    return build_model(made, device=torch.device("cpu"))[0].decoder.layers[0].mlp


def output_and_gradients(mlp, x):
    x = x.clone().requires_grad_()
    y, bias = mlp(x)
    assert bias is None
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, mlp.linear_fc1.weight, mlp.linear_fc2.weight], weight)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_mlp_is_megatrons(precision):
    mlp = built(precision)
    assert isinstance(mlp.activation_func, SwiGLU) and not list(mlp.activation_func.parameters())
    x = torch.randn(64, 2, 32, generator=torch.Generator().manual_seed(1)).to(mlp.linear_fc1.weight.dtype)
    with torch.no_grad():
        mlp.linear_fc1.weight.mul_(50)  # gates of about 5
    found = output_and_gradients(mlp, x)
    del mlp.activation_func
    mlp.activation_func, mlp.config.use_te_activation_func = F.silu, False
    for fused in (False, True):
        mlp.config.bias_activation_fusion = fused
        for have, want in zip(found, output_and_gradients(mlp, x), strict=True):
            if precision == "fp32" and not fused:
                assert torch.equal(have, want)
            else:
                assert (have - want).norm() < (1e-6 if precision == "fp32" else 1e-2) * want.norm()


def test_experts_keep_megatrons():
    mlp = built("fp32", {"moe": {"experts": 4, "hidden_size": 32, "top_k": 2}})
    assert not mlp.config.use_te_activation_func
    assert not any(isinstance(module, SwiGLU) for module in mlp.modules())
