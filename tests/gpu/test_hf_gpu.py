"""The exported model on a GPU: the kernels chosen there give the answers of the plain operations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "hf"))
from tiny import liven, tokens

from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.modeling_hola import HolaForCausalLM


@pytest.fixture(scope="module")
def lm() -> HolaForCausalLM:
    config = HolaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_heads=2,
                        layer_pattern="HGA", key_dim=64, value_dim=64, num_attention_heads=2, cache_block=64,
                        cache_slots=16)
    return liven(HolaForCausalLM(config)).cuda()


@torch.no_grad()
def relative(lm: HolaForCausalLM, found: torch.Tensor, x: torch.Tensor, **given: torch.Tensor) -> float:
    """Root mean square distance from the plain operations in float32, relative to their size."""
    plain = HolaForCausalLM(HolaConfig(**{**lm.config.to_dict(), "backend": "torch"})).cuda().eval()
    plain.load_state_dict(lm.state_dict())
    expected = plain(x, use_cache=False, **given).logits
    return float((found.float() - expected).norm() / expected.norm())


@torch.no_grad()
def test_one_call_many_calls_and_padding(lm):
    x = tokens(2, 300, 512).cuda()
    mask = torch.ones_like(x)
    mask[0, :77] = 0
    assert relative(lm, lm(x, use_cache=False).logits, x) < 1e-3
    cache, parts = None, []
    for start, end in ((0, 150), (150, 151), (151, 300)):
        output = lm(x[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    found, kept = torch.cat(parts, 1), mask.bool()
    alone = lm(x[:1, 77:], use_cache=False).logits
    assert float((found[:1, 77:] - alone).norm() / alone.norm()) < 1e-3
    assert found[kept].isfinite().all()


@torch.no_grad()
def test_decoding_in_bfloat16_follows_the_full_pass(lm):
    half = HolaForCausalLM(HolaConfig(**lm.config.to_dict()))
    half.load_state_dict(lm.state_dict())
    half = half.to(torch.bfloat16).cuda().eval()
    x = tokens(2, 200, 512).cuda()
    cache = half(x[:, :120], use_cache=True).past_key_values
    held = cache.layers[0].nbytes()
    steps = torch.cat([half(x[:, t: t + 1], past_key_values=cache).logits for t in range(120, 200)], 1)
    whole = half(x, use_cache=False).logits[:, 120:]
    assert float((steps.float() - whole.float()).norm() / whole.float().norm()) < 0.05
    assert cache.layers[0].nbytes() == held
