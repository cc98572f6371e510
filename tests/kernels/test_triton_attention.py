"""The fused Triton hola_attention under the interpreter: verify's own measure of the whole operation, tiny shapes."""

from __future__ import annotations

import pytest
import torch
from interpreted import only_interpreted

only_interpreted()

from hola_kernels import hola_attention
from hola_kernels.gated_delta import triton_rule
from hola_kernels.verify_cases import attention_inputs, limit, measure, misplaced

PACKED = (0, 1, 1, 20, 90)  # none, one and many tokens; two chunks of 64, the second not full; three blocks


@pytest.mark.parametrize("options", [
    {"cu_seqlens": PACKED, "heads": 2}, {"rows": 2, "length": 40, "score": "e", "read_norm": "l2", "sink": False},
    {"cu_seqlens": (0, 30, 70), "value": 128, "score": "betav"},
    {"cu_seqlens": PACKED, "score": "recency"}, {"rows": 2, "length": 70, "score": "random"},
    {"cu_seqlens": (*PACKED, 90, 90), "heads": 2, "bounded": True},
    {"cu_seqlens": PACKED, "local": "window", "window": 41}, {"rows": 2, "length": 70, "slots": 0, "score": "recency"},
    {"cu_seqlens": (*PACKED, 90), "local": "window", "window": 20, "slots": 0, "bounded": True, "read_norm": "l2"},
    {"cu_seqlens": PACKED, "local": "none"}],
    ids=["packed", "rows", "betav", "recency", "random", "bounded", "window", "no slots", "window, no slots",
         "itself"])
def test_float32(options):
    check(options)


@pytest.mark.parametrize("cut", [{"length": 130}, {"cu_seqlens": (0, 70, 200, 200), "bounded": True}],
                         ids=["one", "bounded"])
def test_a_sequence_split_into_spans(monkeypatch, cut):
    monkeypatch.setattr(triton_rule, "span_chunks", lambda *_: 1)
    assert "whole" in check({**cut, "split": True})


def test_a_bound_too_low_changes_nothing():
    inputs = attention_inputs(1, 150, 1, 64, 64, torch.float32, 0, "cpu")
    inputs |= {"cu_seqlens": torch.tensor([0, 20, 150]), "block": 32, "slots": 8, "backend": "triton"}
    with torch.no_grad():
        assert torch.equal(hola_attention(**inputs), hola_attention(**inputs, max_seqlen=1))


def test_half_precision_keeps_states_for_a_backward_pass_and_only_for_one(monkeypatch):
    saved, launch = [], triton_rule.launch_state_pass
    monkeypatch.setattr(triton_rule, "launch_state_pass", lambda **x: saved.append(x["keep_states"]) or launch(**x))
    check({"cu_seqlens": PACKED, "heads": 2}, torch.float16)
    assert saved == [True, False]  # the second call is without gradients


def test_a_token_chosen_against_its_score_is_seen():
    rank = torch.tensor([5.0, 1.0, 4.0, 3.0, 9.0, 9.0])[None, :, None].double()
    cache = {"block": 2, "slots": 2, "cu_seqlens": None}
    right = torch.tensor([[[-1, -1]], [[0, 1]], [[0, 2]]])
    assert misplaced(right, rank, cache) == 0
    assert misplaced(torch.tensor([[[-1, -1]], [[0, 1]], [[0, 3]]]), rank, cache) == 0.25
    assert not misplaced(torch.tensor([[[0, -1]], [[0, 1]], [[0, 2]]]), rank, cache) < 1


def check(options, dtype=torch.float32):
    errors = measure(**{"dtype": dtype, "key": 64, "value": 64, "heads": 1, "block": 32, "slots": 8,
                        "device": "cpu", **options})
    name = f"hola_attention {str(dtype).removeprefix('torch.')}"
    assert not {output: error for output, error in errors.items() if not error <= limit(name, output)}
    chosen = {"score", "slots"} if options.get("slots") != 0 else set()
    assert {*chosen, "o", "d q", "d k", "d v", "d log_decay", "d beta", "d gate"} <= errors.keys()
    return errors
