"""exact_attention, the exact part without a state: its definition, pieces and decoded tokens, what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from inputs import gradients, make_inputs, relative_error
from memory_definition import read_packed

from hola_kernels import HolaState, KernelError, exact_attention, exact_attention_step, hola_attention
from hola_kernels.modules import GatedDeltaNet, HolaAttention, LayerCache
from hola_kernels.options import SCORES, STATE_SCORES, STATELESS_SCORES

PACKED, ROWS = [0, 0, 1, 40, 55, 56, 120], [0, 60, 120]
READ = ("q", "k", "v", "gamma_q", "gamma_k", "sink")
LOCAL = {"block": {}, "window": {"local": "window", "window": 21}, "none": {"local": "none"}}
SIZES = {"block": 16, "slots": 8}
every_score, every_local = pytest.mark.parametrize("score", STATELESS_SCORES), pytest.mark.parametrize("local", LOCAL)


def inputs_of(score: str, rows: int = 1, length: int = PACKED[-1], **choices) -> dict[str, torch.Tensor]:
    made = make_inputs(rows, length, key=8, value=6, **choices)
    inputs = {name: made[name] for name in READ}
    if score == "learned":
        generator = torch.Generator().manual_seed(9)
        inputs["route"] = torch.randn(rows, length, 2, generator=generator).to(inputs["v"].dtype).requires_grad_()
    return inputs


def pseudo_random(position: int) -> float:
    """The fixed number of a position, in whole numbers of Python."""
    x = position
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        x = ((x ^ (x >> 15)) * multiplier) % 2**32
    return float((x ^ (x >> 16)) % 2**23)


def scores_by_token(score: str, inputs: dict[str, torch.Tensor], bounds: list[int]) -> torch.Tensor:
    """[1, M, 2]: what ranks every token, one after the other."""
    found = torch.zeros(1, bounds[-1], 2, dtype=torch.float64)
    for position, t in ((t - start, t) for start, end in pairwise(bounds) for t in range(start, end)):
        if score == "betav":
            found[0, t] = inputs["v"][0, t].detach().square().sum(-1).sqrt()
        elif score == "learned":
            found[0, t] = torch.sigmoid(inputs["route"][0, t].detach())
        else:
            found[0, t] = position if score == "recency" else pseudo_random(position)
    return found


def definition(inputs: dict[str, torch.Tensor], score: str, bounds: list[int], **options) -> torch.Tensor:
    """[1, M, H, V] of inputs [1, M, ...]."""
    v = inputs["v"]
    if score == "learned":
        r = torch.sigmoid(inputs["route"])
        v = v * (1 + r - r.detach())[..., None]
    return read_packed(inputs["q"], inputs["k"], v, scores_by_token(score, inputs, bounds), bounds,
                       **{name: inputs[name] for name in READ[3:]}, **options)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("theta", [None, 300.0])
@pytest.mark.parametrize("slots", [0, 8])
@every_local
@every_score
def test_the_output_and_every_gradient_are_the_definition_s(score, local, slots, theta, packed):
    options = {"block": 16, "slots": slots, "rope_theta": theta, **LOCAL[local]}
    inputs, bounds = inputs_of(score), PACKED if packed else ROWS
    expected = definition(inputs, score, bounds, **options)
    want = gradients(expected, inputs)
    assert all(want[name].norm() > 0 for name in want)
    for backend in ("reference", "torch"):
        if packed:
            found = exact_attention(**inputs, **options, score=score, cu_seqlens=torch.tensor(bounds), backend=backend)
        else:
            rows = {name: x[0].unflatten(0, (2, 60)) if x.ndim > 2 else x for name, x in inputs.items()}
            found = exact_attention(**rows, **options, score=score, backend=backend).flatten(0, 1)[None]
        assert relative_error(found, expected) < 1e-9
        have = gradients(found, inputs)
        assert all(relative_error(have[name], want[name]) < 1e-9 for name in want)


@pytest.mark.parametrize("options", [{"read_norm": "l2"}, {"read_norm": "none", "sink": None},
                                     {"slots": 0, "score": "betae"}], ids=str)
def test_other_norms_no_sink_and_a_score_that_ranks_nothing(options):
    inputs = inputs_of("recency")
    if "sink" in options:
        inputs["sink"] = options["sink"]
    given = {**SIZES, **{name: x for name, x in options.items() if name != "sink"}}
    found = exact_attention(**inputs, **given, cu_seqlens=torch.tensor(PACKED))
    expected = definition(inputs, "recency", PACKED, **{name: x for name, x in given.items() if name != "score"})
    assert relative_error(found, expected) < 1e-9


def tokens(inputs, a, b):
    return {name: x[:, a:b] if x is not None and x.ndim > 2 else x for name, x in inputs.items()}


@pytest.mark.parametrize("theta", [None, 300.0])
@pytest.mark.parametrize("slots", [0, 8])
@every_local
@every_score
@torch.no_grad()
def test_pieces_and_decoded_tokens_equal_the_whole(score, local, slots, theta):
    inputs, options = inputs_of(score, rows=3, length=90), {"score": score, "rope_theta": theta, **LOCAL[local]}
    whole = exact_attention(**inputs, block=16, slots=slots, **options)
    parts, state = [], None
    for a, b in ((0, 7), (7, 7), (7, 40), (40, 60)):
        o, state = exact_attention(**tokens(inputs, a, b), block=16, slots=slots, **options, state=state,
                                   return_state=True)
        parts.append(o)
    held = state.nbytes()
    for t in range(60, 90):
        one = {name: x[:, 0] if x.ndim > 2 else x for name, x in tokens(inputs, t, t + 1).items()}
        parts.append(exact_attention_step(**one, **options, state=state)[:, None])
    assert relative_error(torch.cat(parts, 1), whole) < 1e-12
    assert state.nbytes() == held and not state.recurrent and state.state.numel() == 0


def test_packed_pieces_of_unequal_length_equal_the_whole_with_gradients():
    inputs, options = inputs_of("learned", rows=2, length=60), {**SIZES, **LOCAL["window"], "score": "learned"}
    whole = exact_attention(**inputs, **options)
    state, at, parts = None, [0, 0], [[], []]
    for lengths in ((25, 0), (1, 33), (34, 27)):
        row = {name: torch.cat([x[n, at[n]: at[n] + lengths[n]] for n in (0, 1)])[None] if x.ndim > 2 else x
               for name, x in inputs.items()}
        o, state = exact_attention(**row, **options, cu_seqlens=torch.tensor([0, lengths[0], sum(lengths)]),
                                   state=state, return_state=True)
        for n, part in enumerate(o[0].split(lengths)):
            parts[n].append(part)
        at = [start + length for start, length in zip(at, lengths, strict=True)]
    found = torch.stack([torch.cat(row) for row in parts])
    assert relative_error(found, whole) < 1e-12
    want, have = gradients(whole, inputs), gradients(found, inputs)
    assert all(relative_error(have[name], want[name]) < 1e-9 for name in want)


@torch.no_grad()
def test_fewer_heads_of_queries_and_16_bit_values():
    inputs = inputs_of("betav", rows=2, length=50, dtype=torch.float32)
    wide = {**inputs, "v": inputs["v"].repeat(1, 1, 3, 1), "sink": inputs["sink"].repeat(3)}
    full = {name: inputs[name].repeat_interleave(3, 2) for name in ("q", "k")}
    assert torch.equal(exact_attention(**wide, **SIZES, score="betav"),
                       exact_attention(**{**wide, **full}, **SIZES, score="betav"))
    half = {name: x.bfloat16() if x.ndim > 2 else x for name, x in inputs.items()}
    o, state = exact_attention(**half, **SIZES, score="betav", return_state=True)
    one = {name: x[:, 0] if x.ndim > 2 else x for name, x in half.items()}
    assert o.dtype == exact_attention_step(**one, score="betav", state=state).dtype == torch.bfloat16


@torch.no_grad()
def test_what_does_not_fit_is_refused():
    inputs = inputs_of("recency", rows=2, length=20)
    one = {name: x[:, 0] if x.ndim > 2 else x for name, x in inputs.items()}
    _, state = exact_attention(**inputs, **SIZES, return_state=True)
    assert {*STATE_SCORES, "cosine"} - {"betav"} == set(SCORES) - set(STATELESS_SCORES)
    for score in set(SCORES) - set(STATELESS_SCORES):
        said = f"score: '{score}' is of a recurrent state; without one it is one of recency, random, betav, learned"
        with pytest.raises(KernelError, match=said):
            exact_attention(**inputs, **SIZES, score=score)
        with pytest.raises(KernelError, match=said):
            exact_attention_step(**one, score=score, state=state)
    rule = make_inputs(2, 20, key=8, value=6)
    _, with_state = hola_attention(**rule, **SIZES, return_state=True)
    with pytest.raises(KernelError, match="state was written with recurrent = True, the call has False"):
        exact_attention(**inputs, **SIZES, state=with_state)
    with pytest.raises(KernelError, match="state was written with recurrent = True, the call has False"):
        exact_attention_step(**one, state=with_state)
    with pytest.raises(KernelError, match=r"initial_state \(2, 2, 0, 6\)|recurrent = False, the call has True"):
        hola_attention(**rule, **SIZES, state=state)
    with pytest.raises(KernelError, match="state was written with rope_theta = None, the call has 300.0"):
        exact_attention_step(**one, rope_theta=300.0, state=state)
    with pytest.raises(KernelError, match="one token without a state is computed by torch|triton cannot run here"):
        exact_attention_step(**one, state=state, backend="triton")
    with pytest.raises(KernelError, match=r"route: missing, and score is 'learned'"):
        exact_attention(**inputs, **SIZES, score="learned")
    wrong = HolaState.empty(2, 2, 8, 6, **SIZES, dtype=torch.float64)
    wrong.state = wrong.state[:, :, :3]
    with pytest.raises(KernelError, match=r"state.state torch.float64 \(2, 2, 3, 6\) on cpu must be"):
        hola_attention(**rule, **SIZES, state=wrong)


# the layer


def layer(**changes) -> HolaAttention:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_heads": 2, "key_dim": 8, "value_dim": 12, "rule": "none", "block": 8, "slots": 3,
             "score": "recency"}
    return HolaAttention(**sizes | changes)


@every_score
def test_a_layer_has_the_parameters_that_it_trains_and_no_others(score):
    made = layer(score=score, router_width=4)
    names = {name for name, _ in made.named_parameters()}
    route = {"route_proj.weight", "route_out", "route_bias"} if score == "learned" else set()
    assert names == route | {"gamma_q", "gamma_k", "sink", "o_norm.weight", *(
        f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "q_conv", "k_conv", "v_conv"))}
    made(torch.randn(1, 30, 24)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    for parameter in made.parameters():
        parameter.data.fill_(torch.nan)
    made.reset_parameters()
    assert all(p.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("groups", [1, 3])
@every_score
@torch.no_grad()
def test_prefill_steps_and_packed_documents_of_a_layer(score, groups):
    made, x = layer(score=score, num_value_heads=2 * groups), torch.randn(2, 40, 24)
    whole = made(x)
    for first in (0, 21):
        cache = LayerCache()
        parts = [made(x[:, :first], cache=cache)] if first else []
        parts += [made(x[:, t: t + 1], cache=cache) for t in range(first, 40)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    packed = made(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 40, 40, 80]))
    torch.testing.assert_close(packed[0].unflatten(0, (2, 40)), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("changes", "said"), [
    ({"score": "betae"}, "score: 'betae' is of a recurrent state"),
    ({"merge": "two"}, "merge: 'two' is of a state, and rule is 'none'; give 'add'"),
    ({"state_delay": 5}, "state_delay: 5 is of a state, and rule is 'none'; give 0")], ids=str)
def test_a_layer_s_options_of_a_state_are_refused(changes, said):
    with pytest.raises(KernelError, match=said):
        layer(**changes)
    with pytest.raises(KernelError, match="rule: 'none' is not one of gdn, delta"):
        GatedDeltaNet(24, 2, 8, rule="none")
