"""The plan's bytes of rotary positions, against what autograd keeps of 16-bit inputs."""

from __future__ import annotations

import pytest
import torch
from helpers import ROOT

from hola_kernels.options import CacheOptions
from hola_kernels.positions import with_positions
from hola_megatron.config import load_recipe
from hola_megatron.layers.costs import Share
from hola_megatron.layers.hola.costs import saved_unfused

TOKENS, HEADS, WIDTH = 512, 4, 64


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16().requires_grad_()


def kept(call, *inputs: torch.Tensor) -> float:
    """Bytes a token, head and channel that the call saves for its backward pass, its inputs not counted."""
    given, sizes = {x.untyped_storage().data_ptr() for x in inputs}, {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in given:
            sizes[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)  # held, so that none is reused
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()
    assert result is not None
    return sum(size for size, _ in sizes.values()) / (TOKENS * HEADS * WIDTH)


def planned(**cache: object) -> list[float]:
    words = [f"model.cache.{name}={value}" for name, value in cache.items()]
    recipe = load_recipe(ROOT / "recipes/hola_46m.yaml", [*words, "model.backend=torch"])
    share, kind = Share(recipe), recipe.model.layer_kinds[0]
    return [term.bytes / (share.tokens * share.heads(kind) * recipe.model.key_dim)
            for term in saved_unfused(share, kind)]


@pytest.mark.parametrize("read_norm", ["rms", "l2", "none"])
def test_rotary_positions(read_norm):
    q, k, one = half(1, TOKENS, HEADS, WIDTH), half(1, TOKENS, HEADS, WIDTH), torch.ones(WIDTH, requires_grad=True)
    options, bounds = CacheOptions(read_norm=read_norm, rope_theta=1e4), torch.tensor([0, TOKENS])
    measured = kept(lambda: with_positions(q, k, one, one, options, bounds, bounds[:1]), q, k, one)
    assert planned(rope_theta=10000.0, read_norm=read_norm)[1] == pytest.approx(measured, rel=0.05)
