"""The Hugging Face model against itself: however its input is cut, padded, batched or cached, one answer."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny import model, tokens

from hola_megatron.hf.cache_hola import HolaCache
from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.modeling_hola import HolaForCausalLM

PATTERNS = {
    "hola": ("H", {}), "gdn": ("G", {}), "transformer": ("A", {}), "hybrid": ("HGA", {}),
    "delta_net": ("G", {"rule": "delta"}),
    "late": ("gdn", {"state_delay": 7}), "late_chunk": ("GA", {"state_delay": 6, "state_delay_mode": "chunk"}),
    "late_hola": ("H", {"state_delay": 11, "cache_local": "window", "cache_window": 11}),
    "negative_eigenvalues": ("GH", {"beta_range": 2}), "hqlt": ("hqlt", {"hqlt_window": 7}),
    "hqlt_stream": ("hqlt", {"hqlt_window": 7, "hqlt_blend": "delayed_stream", "hqlt_mixing": "scalar"}),
    "hqlt_chunk": ("hqlt, gdn", {"hqlt_window": 6, "hqlt_blend": "delayed_chunk", "hqlt_mixing": "sum"}),
    "ham": ("ham", {"ham_router": "cosine", "ham_threshold": 1.0}),
    "ham_learned": ("ham, attention", {"ham_router_width": 6, "rule": "delta"}),
    "no_sink": ("H", {"cache_sink": False, "cache_read_norm": "l2"}),
    "recency": ("H", {"cache_score": "recency"}), "random": ("HG", {"cache_score": "random"}),
    "cosine": ("H", {"cache_score": "cosine", "cache_local": "window", "cache_window": 11}),
    "learned": ("H", {"cache_score": "learned", "cache_router_width": 4}),
    "window": ("H", {"cache_local": "window", "cache_window": 11}),
    "window_alone": ("HG", {"cache_local": "window", "cache_window": 20, "cache_slots": 0}),
    "no_state": ("H", {"rule": "none", "cache_score": "recency"}),
    "no_state_window": ("HA", {"rule": "none", "cache_score": "betav", "cache_local": "window", "cache_window": 11,
                               "cache_rope_theta": 300.0}),
    # not in the first layer, whose learned score is the same for the same token: rounding would choose
    "no_state_learned": ("AH", {"rule": "none", "cache_score": "learned", "cache_router_width": 4,
                               "cache_local": "none"}),
    "no_state_no_slots": ("H", {"rule": "none", "cache_slots": 0, "cache_sink": False}),
    "deltaproduct": ("deltaproduct", {"beta_range": 2}),
    "deltaproduct_without_decay": ("deltaproduct, hola", {"delta_steps": 3, "rule": "delta"}),
    "convex": ("H", {"cache_merge": "convex", "cache_rope_theta": 300.0}),
    "two_gates": ("HG", {"cache_merge": "two", "cache_rope_theta": 300.0, "cache_read_norm": "none",
                         "cache_local": "window", "cache_window": 11}),
    "block_alone": ("H", {"cache_slots": 0, "cache_read_norm": "none"}), "itself": ("H", {"cache_local": "none"}),
    "no_positions": ("HA", {"rope_theta": None}),
    "grouped": ("A", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "normed": ("AW", {"attention_qk_norm": True}), "attention_window": ("W", {}),
    "narrow": ("W", {"attention_window": 1, "num_key_value_heads": 1}), "window_hybrid": ("GWA", {}),
    "untied": ("H", {"tie_word_embeddings": False, "conv_width": 3}),
}
CLOSE = {"rtol": 0, "atol": 1e-5}  # of logits of size 10, in float64 but for the few float32 steps of a mixer


@pytest.fixture(params=PATTERNS)
def lm(request: pytest.FixtureRequest) -> HolaForCausalLM:
    pattern, changes = PATTERNS[request.param]
    return model(pattern, **changes)


@torch.no_grad()
def test_any_cut_of_the_input_gives_the_full_pass(lm):
    x = tokens(2, 45)  # more than five blocks
    whole = lm(x, use_cache=False).logits
    for cuts in ([45], [1] * 45, [20, 1, 1, 3, 20], [8, 8, 24, 5]):
        cache, parts = None, []
        for part in x.split(cuts, 1):
            output = lm(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
        assert cache.get_seq_length() == 45


@torch.no_grad()
def test_padding_anywhere_changes_nothing(lm):
    x, mask = tokens(4, 40), torch.ones(4, 40, dtype=torch.int64)
    mask[0, :23] = mask[1, 30:] = mask[2, ::3] = 0
    padded = lm(x, attention_mask=mask, use_cache=False).logits
    for n in range(4):
        kept = mask[n].bool()
        torch.testing.assert_close(padded[n, kept], lm(x[n: n + 1, kept], use_cache=False).logits[0], **CLOSE)
    assert padded.isfinite().all()


@torch.no_grad()
def test_left_padding_survives_the_cache(lm):
    x, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.int64)
    mask[0, :23], mask[1, :9] = 0, 0
    # the first call sees nothing at all of row 0
    cache, parts = None, []
    for start, end in ((0, 12), (12, 30), (30, 31), (31, 32), (32, 40)):
        output = lm(x[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    found = torch.cat(parts, 1)
    for n in range(3):
        kept = mask[n].bool()
        torch.testing.assert_close(found[n, kept], lm(x[n: n + 1, kept], use_cache=False).logits[0], **CLOSE)


@torch.no_grad()
def test_a_call_of_padding_only_changes_no_memory(lm):
    x, nothing = tokens(2, 30), torch.zeros(2, 4, dtype=torch.int64)
    cache = lm(x[:, :10], use_cache=True).past_key_values
    lm(x[:, 10:14], attention_mask=nothing, past_key_values=cache)
    after = lm(x[:, 10:], past_key_values=cache, attention_mask=torch.ones(2, 20)).logits
    torch.testing.assert_close(after, lm(x, use_cache=False).logits[:, 10:], **CLOSE)


@torch.inference_mode()
def test_inference_mode_takes_padding_and_the_cache(lm):
    x, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :5] = 0
    cache = lm(x[:, :19], attention_mask=mask[:, :19], use_cache=True).past_key_values
    found = lm(x[:, 19:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, lm(x, attention_mask=mask).logits[:, 19:], **CLOSE)


@torch.no_grad()
def test_cached_rows_can_be_selected_and_repeated(lm):
    x = tokens(3, 33)
    cache = lm(x[:, :30], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 0, 0])
    assert cache.batch_size == 4
    # decoding writes in place: a copied row must not drag its twin along
    new = tokens(4, 3, seed=5)
    steps = [lm(new[:, t: t + 1], past_key_values=cache).logits for t in range(3)]
    whole = lm(torch.cat([x[rows, :30], new], 1), use_cache=False).logits[:, 30:]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)
    cache.reset()
    torch.testing.assert_close(lm(x, past_key_values=cache).logits, lm(x, use_cache=False).logits, **CLOSE)


@torch.no_grad()
def test_decoding_in_the_middle_of_a_graph_keeps_the_caller_s_memory_apart():
    lm, x = model("H"), tokens(1, 20)
    first = lm(x[:, :10], use_cache=True).past_key_values
    again = lm(x[:, :10], use_cache=True).past_key_values
    lm(x[:, 10:11], past_key_values=first)
    whole = lm(x, use_cache=False).logits[:, 10:]
    torch.testing.assert_close(lm(x[:, 10:], past_key_values=again).logits, whole, **CLOSE)


@pytest.mark.parametrize("pattern", ["H", "G", "HG", "W"])
@torch.no_grad()
def test_cache_bytes_are_constant_from_1k_to_64k_tokens(pattern):
    lm = model(pattern, num_hidden_layers=len(pattern), num_heads=1, value_dim=8, hidden_size=8, intermediate_size=8,
               cache_block=128, attention_window=100)
    cache, sizes = HolaCache(lm.config), {}
    for start in range(0, 65536, 4096):
        lm(tokens(1, 4096, seed=start), past_key_values=cache, logits_to_keep=1)
        sizes[start + 4096] = cache.nbytes()
    short = lm(tokens(1, 1024), use_cache=True, logits_to_keep=1).past_key_values
    assert set(sizes.values()) == {short.nbytes()} and cache.get_seq_length() == 65536
    assert short.nbytes() > 0
    lm(tokens(1, 1), past_key_values=cache)
    assert cache.nbytes() == short.nbytes()


def test_loss_is_shifted_cross_entropy_and_ignores_minus_100():
    lm, x = model("HGA"), tokens(2, 20)
    labels = x.clone()
    labels[:, :5] = -100
    output = lm(x, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, 4:-1].flatten(0, 1), x[:, 5:].flatten())
    torch.testing.assert_close(output.loss, expected.float())


def test_gradient_checkpointing_changes_no_gradient():
    lm, x = model("HGA").train(), tokens(2, 20)
    gradients = []
    for enabled in (False, True):
        if enabled:
            lm.gradient_checkpointing_enable()
        lm.zero_grad()
        lm(x, labels=x).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in lm.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient.abs().sum() > 0, name


def test_use_cache_in_training_changes_no_gradient():
    lm, x = model("HGA").train(), tokens(2, 20)
    assert lm(x).past_key_values is None
    gradients = []
    for use_cache in (False, True):
        lm.zero_grad()
        lm(x, labels=x, use_cache=use_cache).loss.backward()
        gradients.append([p.grad.clone() for p in lm.parameters()])
    for with_cache, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_cache, without)


def test_embeddings_are_tied_and_resized_as_elsewhere():
    lm = model("HG")
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    lm.resize_token_embeddings(70)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight and lm(tokens(1, 4)).logits.shape == (1, 4, 70)
    untied = model("H", tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_start_values_are_those_of_training():
    torch.manual_seed(0)
    lm = HolaForCausalLM(model("HGA").config)
    mixer = lm.model.layers[0].mixer
    assert torch.equal(mixer.gate, torch.full((2,), -4.0)) and torch.equal(mixer.sink, torch.zeros(2))
    assert mixer.gamma_q.eq(1).all() and mixer.o_norm.weight.eq(1).all() and lm.model.norm.weight.eq(1).all()
    assert (mixer.A_log <= torch.tensor(16.0).log()).all()
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert ((dt > 0.9e-3) & (dt < 0.11)).all()
    assert 0.015 < lm.model.embed_tokens.weight.std() < 0.025
    assert mixer.q_conv.weight.abs().max() <= 0.5


@torch.no_grad()
def test_outputs_as_transformers_users_expect_them():
    lm, x = model("HGA"), tokens(2, 12)
    output = lm(x, output_hidden_states=True, logits_to_keep=2)
    assert len(output.hidden_states) == 4 and output.logits.shape == (2, 2, 64)
    as_tuple = lm(x, return_dict=False, use_cache=False)
    torch.testing.assert_close(as_tuple[0][:, -2:], output.logits)
    embedded = lm(inputs_embeds=lm.model.embed_tokens(x)).logits
    torch.testing.assert_close(embedded[:, -2:], output.logits)


def test_wrong_inputs_are_named():
    lm, x = model("H"), tokens(1, 4)
    from transformers import DynamicCache

    filled = DynamicCache()
    filled.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)
    with pytest.raises(ValueError, match="past_key_values must be a HolaCache, not DynamicCache"):
        lm(x, past_key_values=filled)
    with pytest.raises(ValueError, match=r"attention_mask \(1, 1, 4, 4\) must be \[B, T\]"):
        lm(x, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        lm()
    with pytest.raises(NotImplementedError, match="cannot be rolled back"):
        lm(x).past_key_values.crop(2)
    with pytest.raises(ValueError, match="layer_pattern: unknown layer kind .* allowed: hola"):
        model("HX")


@torch.no_grad()
def test_cuda_graph_changes_nothing_without_a_gpu_and_is_refused_where_it_cannot_be(tmp_path):
    x, found = tokens(2, 30), []
    for cuda_graph in (False, True):
        lm = model("HG", cuda_graph=cuda_graph, key_dim=16)
        cache = lm(x[:, :9]).past_key_values
        found.append(torch.cat([lm(x[:, t: t + 1], past_key_values=cache).logits for t in range(9, 30)], 1))
    assert torch.equal(*found) and cache.graph is None
    refused = (({"layer_pattern": "HA"}, "memory of attention layers grows"), ({"backend": "torch"}, "backend 'torch'"),
               ({"cache_score": "recency"}, "cache_score 'recency' is not one of betae, e, betav"),
               ({"rule": "none", "cache_score": "betav"}, "rule 'none' decodes by plain torch operations"),
               ({"value_dim": 512}, "value_dim 512 is none of 16, 32"), ({"conv_width": 5}, "conv_width 5 is over 4"))
    for wrong, why in refused:
        with pytest.raises(ValueError, match=f"cuda_graph: .*{why}.*; leave it off"):
            HolaConfig(cuda_graph=True, **wrong)
    assert HolaConfig(cuda_graph=True, layer_pattern="G", cache_score="recency").cuda_graph
    assert HolaConfig(cuda_graph=True, layer_pattern="GW").cuda_graph
    with pytest.raises(ValueError, match="num_key_value_heads: 3 does not divide num_attention_heads = 16"):
        HolaConfig(num_key_value_heads=3)
    model("AH").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="memory of attention layers grows"):
        HolaForCausalLM.from_pretrained(tmp_path, cuda_graph=True)


@torch.no_grad()
def test_bfloat16_keeps_decay_gates_and_read_norms_in_float32(tmp_path):
    lm = model("HGA").float()
    lm.save_pretrained(tmp_path)
    half = HolaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    wide = {name.rpartition(".")[2] for name, dtype in kinds.items() if dtype == torch.float32}
    assert wide == {"A_log", "dt_bias", "gamma_q", "gamma_k", "gate", "sink"}
    x = tokens(2, 30)
    whole, cache = half(x, use_cache=False).logits, None
    assert whole.dtype == torch.bfloat16
    for part in x.split([20, 1, 9], 1):
        output = half(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    assert cache.layers[0].state.open_k.dtype == torch.bfloat16 and cache.layers[0].state.state.dtype == torch.float32
    error = (lm(x).logits - whole.float()).norm() / lm(x).logits.norm()
    assert error < 0.1


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
@torch.no_grad()
def test_a_model_spread_by_device_map_gives_the_same_logits(tmp_path):
    lm, x = model("HGA").float(), tokens(2, 20)
    lm.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    spread = HolaForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    mask = torch.ones_like(x)
    mask[0, :7] = 0
    cache = None
    for start, end in ((0, 15), (15, 16), (16, 20)):
        output = spread(x[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    torch.testing.assert_close(output.logits, lm(x, attention_mask=mask).logits[:, 16:], rtol=0, atol=1e-4)
