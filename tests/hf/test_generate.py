"""`generate` by every road: with and without the cache, batched, padded, in chunks, by beams."""

from __future__ import annotations

import pytest
import torch
from tiny import model, tokens

OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def generate(lm, x, new=26, mask=None, **options):
    """New tokens only; prompts of 5 to 15 and 26 new ones cross blocks of 8 and the 3 slots."""
    mask = torch.ones_like(x) if mask is None else mask
    return lm.generate(x, attention_mask=mask, max_new_tokens=new, **{**OPTIONS, **options})[:, x.shape[1]:]


@pytest.mark.parametrize("pattern", ["H", "G", "W", "HGA", "WA", "ham"])
def test_greedy_is_the_same_with_and_without_the_cache(pattern):
    lm, x = model(pattern), tokens(2, 7)
    found = generate(lm, x)
    assert found.unique().numel() > 3  # a constant answer would prove nothing
    assert torch.equal(found, generate(lm, x, use_cache=False))
    assert torch.equal(found, generate(lm, x, prefill_chunk_size=3))


@pytest.mark.parametrize("score", ["betae", "e", "betav", "recency", "random", "cosine", "learned"])
def test_every_score_generates_the_same_with_and_without_the_cache(score):
    lm, x = model("H", cache_score=score), tokens(3, 15)
    mask = torch.ones_like(x)
    mask[0, :6] = 0
    found = generate(lm, x, mask=mask, new=24)
    assert torch.equal(found, generate(lm, x, mask=mask, new=24, use_cache=False))
    assert torch.equal(found[:1], generate(lm, x[:1, 6:], new=24))  # ranks count tokens, not columns


@pytest.mark.parametrize("options", [
    {"cache_local": "window", "cache_window": 11}, {"cache_local": "window", "cache_window": 5, "cache_slots": 0},
    {"cache_slots": 0}, {"cache_local": "none"}, {"cache_read_norm": "none"},
    {"cache_merge": "two", "cache_rope_theta": 300.0},
    *({"rule": "none", "cache_score": score, "cache_rope_theta": base, **local} for score, base, local in (
        ("recency", None, {}), ("random", 300.0, {"cache_local": "window", "cache_window": 11}),
        ("betav", None, {"cache_local": "none"}), ("learned", 300.0, {}), ("betae", 300.0, {"cache_slots": 0})))],
    ids=str)
def test_every_local_part_generates_the_same_with_and_without_the_cache(options):
    pattern = "AH" if options.get("cache_score") == "learned" else "H"  # of the first layer a repeated token ties
    lm, x = model(pattern, **options), tokens(2, 15)
    assert torch.equal(generate(lm, x, new=40), generate(lm, x, new=40, use_cache=False))


@pytest.mark.parametrize("pattern", ["H", "G", "W", "HGA", "WA", "ham"])
def test_a_left_padded_batch_equals_its_prompts_alone(pattern):
    lm, lengths = model(pattern), (15, 5, 9)
    x, mask = tokens(3, 15), torch.ones(3, 15, dtype=torch.int64)
    for n, length in enumerate(lengths):
        mask[n, : 15 - length] = 0
    together = generate(lm, x, mask=mask)
    chunked = generate(lm, x, mask=mask, prefill_chunk_size=4)
    for n, length in enumerate(lengths):
        alone = generate(lm, x[n: n + 1, 15 - length:])[0]
        assert torch.equal(together[n], alone) and torch.equal(chunked[n], alone)


@pytest.mark.parametrize("pattern", ["H", "HGA", "W", "ham"])
def test_beams_are_the_same_with_and_without_the_cache(pattern):
    lm, x, mask = model(pattern), tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    options = {"num_beams": 3, "mask": mask, "new": 14}
    found = generate(lm, x, **options)
    assert torch.equal(found, generate(lm, x, use_cache=False, **options))
    assert not torch.equal(found, generate(lm, x, mask=mask, new=14))  # else beams did nothing


def test_sampling_is_the_same_with_and_without_the_cache():
    lm, x = model("HG"), tokens(2, 9)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(generate(lm, x, do_sample=True, temperature=1.3, top_k=20, use_cache=use_cache,
                              num_return_sequences=2))
    assert torch.equal(*found) and found[0].shape == (4, 26)


def test_generation_goes_on_from_a_cache_and_returns_it():
    lm, x = model("HGA"), tokens(1, 9)
    whole = generate(lm, x, new=20)
    first = lm.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=8, return_dict_in_generate=True, **OPTIONS)
    cache = first.past_key_values
    assert cache.get_seq_length() == 9 + 8 - 1
    longer = first.sequences
    rest = lm.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=cache, max_new_tokens=12,
                       **OPTIONS)
    assert torch.equal(rest[:, 9:], whole)


def test_assisted_decoding_is_refused():
    lm = model("H")
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(lm, tokens(1, 5), assistant_model=model("H"))
