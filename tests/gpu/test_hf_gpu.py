"""The exported model on a GPU: the kernels chosen there give the answers of the plain operations."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "hf"))
from tiny import liven, tokens

from hola_kernels import KernelError
from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.modeling_hola import HolaForCausalLM, float32_parameters


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


def twins(pattern: str, **changes: int) -> tuple[HolaForCausalLM, HolaForCausalLM]:
    """One model without and with `cuda_graph`, bfloat16."""
    found = []
    for cuda_graph in (False, True):
        config = HolaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_heads=2,
                            layer_pattern=pattern, key_dim=64, value_dim=64, cache_block=64, cache_slots=16,
                            cuda_graph=cuda_graph, **changes)
        found.append(liven(HolaForCausalLM(config)).to(torch.bfloat16).cuda())
        for name, x in found[-1].named_parameters():
            if name.rpartition(".")[2] in float32_parameters(config):
                x.data = x.data.float()
    return tuple(found)


@pytest.mark.parametrize("pattern", ["H", "HG"])
@torch.no_grad()
def test_a_recorded_token_is_the_token(pattern):
    """Bit for bit over three blocks; another batch order, a copied cache and longer input in between."""
    plain, recorded = twins(pattern)
    x = tokens(3, 400, 512).cuda()
    have = ([], [])
    for lm, parts in zip((recorded, plain), have, strict=True):
        cache = lm(x[:, :100], use_cache=True).past_key_values
        for t in range(100, 300):
            parts.append(lm(x[:, t: t + 1], past_key_values=cache).logits)
        assert (cache.graph is not None) == lm.config.cuda_graph
        copied = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        for held in (cache, copied):
            for t in range(300, 320):
                parts.append(lm(x[:, t: t + 1], past_key_values=held).logits)
        parts.append(lm(x[:, 320:340], past_key_values=cache).logits)
        for t in range(340, 400):
            parts.append(lm(x[:, t: t + 1], past_key_values=cache, output_hidden_states=t % 7 == 0).logits)
    assert all(torch.equal(a, b) for a, b in zip(*have, strict=True))
    assert not torch.equal(have[0][0], have[0][1])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_a_graph(options):
    plain, recorded = twins("HG")
    x, mask = tokens(2, 40, 512).cuda(), torch.ones(2, 40, dtype=torch.int64, device="cuda")
    mask[0, :11] = 0
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 90, **options}
    want, have = (lm.generate(x, attention_mask=mask, **options) for lm in (plain, recorded))
    assert torch.equal(want, have) and have[:, 40:].unique().numel() > 3


@torch.no_grad()
def test_what_a_recording_was_made_of_may_change():
    """A batch of another size, a model that was moved, autocast, inference mode: as without, and then recorded anew."""
    plain, recorded = twins("H")
    x, have = tokens(3, 200, 512).cuda(), ([], [])
    for lm, parts in zip((recorded, plain), have, strict=True):
        cache = lm(x[:, :50], use_cache=True).past_key_values

        def go(start: int, end: int, lm=lm, cache=cache, parts=parts) -> None:
            parts.extend(lm(x[:, t: t + 1], past_key_values=cache).logits.clone() for t in range(start, end))

        go(50, 60)
        with torch.autocast("cuda", torch.bfloat16):
            go(60, 65)
        go(65, 70)
        with torch.inference_mode():
            go(70, 80)
        go(80, 90)
        lm.cpu()
        held = torch.empty(1 << 22, device="cuda")  # takes the weights' old place
        lm.cuda()
        go(90, 120)
        with pytest.raises(KernelError):
            lm(x[:1, 120:121], past_key_values=cache)
        del held
    assert all(torch.equal(a, b) for a, b in zip(*have, strict=True))


@torch.no_grad()
def test_triton_steps_follow_the_plain_ones_through_a_model(lm):
    """float32, 200 tokens, blocks closed on the way."""
    config = HolaConfig(**{**lm.config.to_dict(), "layer_pattern": "HG"})
    fast = liven(HolaForCausalLM(config)).cuda()
    slow = HolaForCausalLM(HolaConfig(**{**config.to_dict(), "backend": "torch"})).cuda().eval()
    slow.load_state_dict(fast.state_dict())
    x, logits = tokens(2, 300, 512).cuda(), []
    for one in (fast, slow):
        cache = one(x[:, :100], use_cache=True).past_key_values
        logits.append(torch.cat([one(x[:, t: t + 1], past_key_values=cache).logits for t in range(100, 300)], 1))
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 1e-3
