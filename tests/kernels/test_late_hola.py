"""hola_attention whose state is read late: its definition, pieces and decoded tokens, what is refused."""

from __future__ import annotations

import pytest
import torch
from inputs import gradients, make_inputs, relative_error
from memory_definition import late_loop, merged, read_packed

from hola_kernels import KernelError, hola_attention, hola_attention_step
from hola_kernels.state import HolaState

PACKED = [0, 0, 1, 40, 55, 56, 120]
RULE, READ = ("q", "k", "v", "log_decay", "beta"), ("gamma_q", "gamma_k", "sink")
SIZES = {"block": 16, "slots": 8}
OPTIONS = {"bmojo": {"local": "window", "window": 21, "state_delay": 21}, "one": {"state_delay": 1},
           "long": {"state_delay": 50, "local": "none", "merge": "two", "score": "recency"},
           "rotated": {"state_delay": 16, "rope_theta": 500.0, "merge": "convex", "score": "cosine"},
           "no cache": {"state_delay": 9, "local": "window", "window": 9, "slots": 0}}


def inputs_of(merge: str = "add", rows: int = 1, length: int = PACKED[-1]) -> dict[str, torch.Tensor]:
    inputs = make_inputs(rows, length, key=8, value=6)
    if merge != "add":
        generator = torch.Generator().manual_seed(9)
        inputs["gate"] = torch.randn(rows, length, 2, {"convex": 6, "two": 2}[merge], generator=generator,
                                     dtype=torch.float64).requires_grad_()
    return inputs


def definition(inputs, *, state_delay, merge="add", score="betae", **options):
    """Scores are those of the state that is not late."""
    o_state, written = late_loop(*(inputs[name][0] for name in RULE), state_delay, "stream", PACKED)
    rank = written if score == "betae" else torch.arange(PACKED[-1])[:, None].expand_as(written).double()
    if score == "cosine":
        rank = cosine_loop(*(inputs[name][0] for name in RULE))
    o_exact = read_packed(*(inputs[name] for name in "qkv"), rank[None].detach(),
                          PACKED, **{name: inputs[name] for name in READ}, **options)
    return merged(o_state[None], o_exact, inputs["gate"], merge)


def cosine_loop(q, k, v, log_decay, beta):
    """1 - cos(v, what the decayed state returns for the key), from the loop that has no delay and reads keys."""
    answers = torch.empty_like(v)
    for start, end in zip(PACKED[:-1], PACKED[1:], strict=True):
        for t in range(start, end):
            still = torch.zeros_like(beta[start: t + 1])
            still[:-1] = beta[start: t]
            part = late_loop(k[start: t + 1], k[start: t + 1], v[start: t + 1], log_decay[start: t + 1], still, 0,
                             "stream", (0, t + 1 - start))[0]
            answers[t] = part[-1].detach()
    return 1 - torch.nn.functional.cosine_similarity(v, answers, dim=-1, eps=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_output_is_its_definition(backend, name):
    options = {**SIZES, **OPTIONS[name]}
    inputs = inputs_of(options.get("merge", "add"))
    found = hola_attention(**inputs, **options, cu_seqlens=torch.tensor(PACKED), backend=backend)
    expected = definition(inputs, **options)
    assert relative_error(found, expected) < 1e-9
    want, have = gradients(expected, inputs), gradients(found, inputs)
    assert all(relative_error(have[name], want[name]) < 1e-9 for name in want)
    assert all(want[name].norm() > 0 for name in want)


@pytest.mark.parametrize("name", OPTIONS)
def test_pieces_and_decoded_tokens_equal_the_whole(name):
    options = {**SIZES, **OPTIONS[name]}
    by_row = inputs_of(options.get("merge", "add"), rows=3, length=90)
    with torch.no_grad():
        whole = hola_attention(**by_row, **options)
        parts, state = [], None
        for a, b in ((0, 7), (7, 7), (7, 40), (40, 60)):
            o, state = hola_attention(**tokens(by_row, a, b), **options, state=state, return_state=True)
            parts.append(o)
        held, step = state.nbytes(), {name: x for name, x in options.items() if name not in (*SIZES, "state_delay")}
        for t in range(60, 90):
            one = {name: x[:, 0] if x.ndim > 2 else x for name, x in tokens(by_row, t, t + 1).items()}
            parts.append(hola_attention_step(**one, **step, state=state)[:, None])
        assert relative_error(torch.cat(parts, 1), whole) < 1e-12
        assert state.nbytes() == held and state.state_delay == options["state_delay"]


def tokens(inputs, a, b):
    return {name: x[:, a:b] if x.ndim > 2 else x for name, x in inputs.items()}


def test_packed_pieces_of_unequal_length_equal_the_whole_with_gradients():
    options = {**SIZES, **OPTIONS["bmojo"]}
    inputs = inputs_of(rows=2, length=60)
    whole = hola_attention(**inputs, **options)
    state, at, parts = None, [0, 0], [[], []]
    for lengths in ((25, 0), (1, 33), (34, 27)):
        row = {name: torch.cat([x[n, at[n]: at[n] + lengths[n]] for n in (0, 1)])[None] if x.ndim > 2 else x
               for name, x in inputs.items()}
        o, state = hola_attention(**row, **options, cu_seqlens=torch.tensor([0, lengths[0], sum(lengths)]),
                                  state=state, return_state=True)
        for n, part in enumerate(o[0].split(lengths)):
            parts[n].append(part)
        at = [start + length for start, length in zip(at, lengths, strict=True)]
    found = torch.stack([torch.cat(row) for row in parts])
    assert relative_error(found, whole) < 1e-12
    want, have = gradients(whole, inputs), gradients(found, inputs)
    assert all(relative_error(have[name], want[name]) < 1e-9 for name in want)


def test_rows_of_a_memory_are_selected_with_their_late_state():
    options = {**SIZES, **OPTIONS["bmojo"]}
    with torch.no_grad():
        inputs = inputs_of(rows=2, length=30)
        _, state = hola_attention(**tokens(inputs, 0, 20), **options, return_state=True)
        turned = state.select(torch.tensor([1, 0]))
        assert set(turned.tensors()) >= {"late.state", "late.k", "late.length"}
        rest = {name: x.flip(0) if x.ndim > 2 else x for name, x in tokens(inputs, 20, 30).items()}
        straight = hola_attention(**tokens(inputs, 20, 30), **options, state=state)
        assert torch.equal(hola_attention(**rest, **options, state=turned).flip(0), straight)


def test_what_does_not_fit_is_refused():
    inputs = inputs_of(rows=2, length=20)
    with pytest.raises(KernelError, match="state_delay = -1 must be a whole number"):
        hola_attention(**inputs, state_delay=-1)
    _, state = hola_attention(**inputs, **SIZES, state_delay=5, return_state=True)
    for delay in (0, 4):
        with pytest.raises(KernelError, match=f"state was written with state_delay = 5, the call has {delay}"):
            hola_attention(**inputs, **SIZES, state_delay=delay, state=state)
    state.late.beta = state.late.beta[:, :, :1]
    with pytest.raises(KernelError, match=r"state.late.beta torch.float64 \(2, 5, 1\) on cpu must be"):
        hola_attention(**inputs, **SIZES, state_delay=5, state=state)


@torch.no_grad()
def test_a_memory_goes_on_with_its_own_rotary_positions():
    inputs = inputs_of(rows=2, length=20)
    one = {name: x[:, 0] if x.ndim > 2 else x for name, x in inputs.items()}
    for base, other in ((None, 500.0), (500.0, None), (500.0, 400.0)):
        _, state = hola_attention(**inputs, **SIZES, rope_theta=base, return_state=True)
        with pytest.raises(KernelError, match=f"state was written with rope_theta = {base}, the call has {other}"):
            hola_attention(**inputs, **SIZES, rope_theta=other, state=state)
        with pytest.raises(KernelError, match=f"state was written with rope_theta = {base}, the call has {other}"):
            hola_attention_step(**one, rope_theta=other, state=state)
        hola_attention_step(**one, rope_theta=base, state=state)
    fresh = HolaState.empty(2, 2, 8, 6, **SIZES, rope_theta=500.0, dtype=torch.float64)
    found = hola_attention(**inputs, **SIZES, rope_theta=500.0, state=fresh)
    assert torch.equal(found, hola_attention(**inputs, **SIZES, rope_theta=500.0))
