"""The cache's scores that the state's kernels do not know: cosine, and a learned one with its gradient."""

from __future__ import annotations

import pytest
import torch
from inputs import gradients, make_inputs, relative_error
from memory_definition import merged, read_packed

from hola_kernels import KernelError, gated_delta_rule, hola_attention, hola_attention_step
from hola_kernels.modules import HolaAttention

PACKED = [0, 0, 1, 40, 55, 56, 120]
OPTIONS = {"block": 16, "slots": 8, "local": "window", "window": 5}
RULE = ("q", "k", "v", "log_decay", "beta")


def inputs_of(score: str, rows: int = 1, length: int = PACKED[-1]) -> dict[str, torch.Tensor]:
    inputs = make_inputs(rows, length, key=8, value=6)
    if score == "learned":
        generator = torch.Generator().manual_seed(9)
        inputs["route"] = torch.randn(rows, length, 2, generator=generator, dtype=torch.float64).requires_grad_()
    return inputs


def cosine_by_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """1 - cos(v, S k^) with the decayed state before every token, one after the other."""
    found = torch.zeros(PACKED[-1], 2, dtype=torch.float64)
    k, v, log_decay, beta = (inputs[name].detach()[0] for name in RULE[1:])
    for start, end in zip(PACKED[:-1], PACKED[1:], strict=True):
        for head in range(2):
            state = torch.zeros(8, 6, dtype=torch.float64)
            for t in range(start, end):
                unit = k[t, head] / (k[t, head].square().sum() + 1e-6).sqrt()
                state = log_decay[t, head].exp() * state
                answer = state.T @ unit
                lengths = v[t, head].norm() * answer.norm()
                found[t, head] = 1 - (v[t, head] @ answer / lengths if lengths > 0 else 0.0)
                state = state + beta[t, head] * torch.outer(unit, v[t, head] - answer)
    return found[None]


def definition(inputs: dict[str, torch.Tensor], score: str) -> torch.Tensor:
    o_state, _, _ = gated_delta_rule(**{name: inputs[name] for name in RULE}, cu_seqlens=torch.tensor(PACKED),
                                     backend="reference")
    v = inputs["v"]
    if score == "learned":
        rank = torch.sigmoid(inputs["route"])
        v = v * (1 + rank - rank.detach())[..., None]
    else:
        rank = cosine_by_tokens(inputs)
    read = {name: inputs[name] for name in ("gamma_q", "gamma_k", "sink")}
    o_exact = read_packed(inputs["q"], inputs["k"], v, rank.detach(), PACKED, **read, **OPTIONS)
    return merged(o_state, o_exact, inputs["gate"], "add")


@pytest.mark.parametrize("score", ["cosine", "learned"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_output_is_its_definition(backend, score):
    inputs = inputs_of(score)
    found = hola_attention(**inputs, **OPTIONS, score=score, cu_seqlens=torch.tensor(PACKED), backend=backend)
    expected = definition(inputs, score)
    assert relative_error(found, expected) < 1e-9
    want, have = gradients(expected, inputs), gradients(found, inputs)
    assert all(relative_error(have[name], want[name]) < 1e-9 and want[name].norm() > 0 for name in want)


@pytest.mark.parametrize("score", ["cosine", "learned"])
def test_pieces_and_decoded_tokens_equal_the_whole(score):
    with torch.no_grad():
        inputs = inputs_of(score, rows=3, length=70)
        whole = hola_attention(**inputs, **OPTIONS, score=score)
        by_token = {name for name, x in inputs.items() if x.ndim > 2}
        parts, state = [], None
        for a, b in ((0, 7), (7, 40), (40, 50)):
            piece = {name: x[:, a:b] if name in by_token else x for name, x in inputs.items()}
            o, state = hola_attention(**piece, **OPTIONS, score=score, state=state, return_state=True)
            parts.append(o)
        choices = {"local": "window", "window": 5, "score": score}
        for t in range(50, 70):
            one = {name: x[:, t] if name in by_token else x for name, x in inputs.items()}
            parts.append(hola_attention_step(**one, **choices, state=state)[:, None])
        assert relative_error(torch.cat(parts, 1), whole) < 1e-12


def test_a_learned_score_is_trained():
    """Every parameter of the score's network has a gradient, and the score moves."""
    torch.manual_seed(0)
    layer = HolaAttention(16, 2, 8, block=4, slots=1, score="learned", router_width=4, gate_init=4.0)
    x, optimizer = torch.randn(1, 12, 16), torch.optim.Adam(layer.parameters(), lr=1e-2)
    before = layer.tokens(x)["route"].detach()
    for _ in range(5):
        optimizer.zero_grad()
        layer(x)[:, 8:].square().sum().backward()
        router = ("route_proj.weight", "route_out", "route_bias")
        assert all(layer.get_parameter(name).grad.norm() > 0 for name in router)
        optimizer.step()
    assert not torch.equal(layer.tokens(x)["route"], before)


def test_logits_that_do_not_fit_are_refused():
    inputs = inputs_of("learned", rows=2, length=20)
    with pytest.raises(KernelError, match="route: given, and score is 'betae'; it goes with 'learned' alone"):
        hola_attention(**inputs)
    with pytest.raises(KernelError, match="route: missing, and score is 'learned'"):
        hola_attention(**{**inputs, "route": None}, score="learned")
    with pytest.raises(KernelError, match=r"route \(2, 20, 1\) must be \[2, 20, 2\]"):
        hola_attention(**{**inputs, "route": inputs["route"][..., :1]}, score="learned")


def test_large_logits_rank_by_their_size_and_values_stay_the_same_bits():
    """Logits whose sigmoid is one in float32 still differ, and training reads the values that evaluation reads."""
    inputs = {name: x.detach().float() for name, x in make_inputs(1, 24, key=8, value=6).items()}
    route = torch.zeros(1, 24, 2)
    route[:, 2], route[:, 3], route[:, 5] = 17.0, 30.0, 18.0
    _, state = hola_attention(**inputs, route=route, score="learned", block=8, slots=1, return_state=True)
    assert state.cache_position.flatten().tolist() == [3, 3]
    trained = hola_attention(**inputs, route=route.clone().requires_grad_(), score="learned", block=8, slots=1)
    assert torch.equal(trained.detach(), hola_attention(**inputs, route=route, score="learned", block=8, slots=1))


def test_a_router_without_width_is_refused():
    for width in (0, -1, "a"):
        with pytest.raises(KernelError, match="router_width"):
            HolaAttention(16, 2, 8, score="learned", router_width=width)
