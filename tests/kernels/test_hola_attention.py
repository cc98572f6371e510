"""Every backend against the token-by-token definition: forward, every gradient, state, causality."""

from __future__ import annotations

import pytest
import torch
from inputs import gradients, make_inputs, relative_error

from hola_kernels import HolaState, KernelError, gated_delta_rule, hola_attention, hola_attention_step, select_cache

SMALL = {"block": 32, "slots": 8}
LENGTHS = (1, 63, 64, 65, 255, 256, 257, 500)
PACKINGS = {"one": [0, 130], "ragged": [0, 1, 40, 104, 105, 230], "empty": [0, 0, 64, 64, 65, 129, 129]}


def run(inputs, backend, **options):
    return hola_attention(**inputs, backend=backend, **{**SMALL, **options})


def compare(inputs, tolerance_forward, tolerance_gradient, definition=None, **options):
    """The torch backend on `inputs` against the reference on `definition` (the same in float64)."""
    definition = definition or inputs
    expected, found = run(definition, "reference", **options), run(inputs, "torch", **options)
    assert relative_error(found, expected) < tolerance_forward
    want, have = gradients(expected, definition), gradients(found, inputs)
    worst = {name: relative_error(have[name], want[name]) for name in want if want[name].norm() > 0}
    assert worst and max(worst.values()) < tolerance_gradient, worst


@pytest.mark.parametrize("decay", ["slow", "fast", "none"])
@pytest.mark.parametrize("length", LENGTHS)
def test_float64_matches_the_definition(length, decay):
    compare(make_inputs(2 if length < 100 else 1, length, decay=decay), 1e-9, 1e-9)


def test_float64_matches_the_definition_at_full_block_and_length_1000():
    compare(make_inputs(1, 1000, heads=1, key=8, value=12), 1e-9, 1e-9, block=256, slots=64)


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_documents_match_the_definition(packing):
    cu_seqlens = PACKINGS[packing]
    compare(make_inputs(1, cu_seqlens[-1]), 1e-9, 1e-9, cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))


@pytest.mark.parametrize("length", [65, 257])
@pytest.mark.parametrize("decay", ["slow", "fast"])
def test_float32_is_within_the_contract(length, decay):
    inputs = make_inputs(1, length, decay=decay, dtype=torch.float32, key=32, value=32)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    compare(inputs, 1e-5, 1e-4, definition=exact)


@pytest.mark.parametrize("options", [
    {"score": "e"}, {"score": "betav"}, {"score": "recency"}, {"score": "random"}, {"read_norm": "l2"},
    {"slots": 64, "block": 16}, {"slots": 1, "block": 1}, {"slots": 0}, {"local": "window", "window": 40},
    {"local": "none", "read_norm": "none"}], ids=str)
def test_variants_match_the_definition(options):
    compare(make_inputs(1, 150), 1e-9, 1e-9, **options)


@pytest.mark.parametrize("score", ["betae", "e"])
def test_write_strengths_up_to_two_match_the_definition(score):
    """Similar keys, no decay: every token reverses what those before it wrote."""
    inputs = {name: x.detach() for name, x in make_inputs(1, 200, decay="none").items()}
    inputs["k"] = inputs["k"][:, :1] + 0.1 * inputs["k"]
    inputs["beta"] = 2 * inputs["beta"]
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    assert float(inputs["beta"].detach().max()) > 1.99
    compare(inputs, 1e-9, 1e-9, score=score, cu_seqlens=torch.tensor([0, 70, 200]))
    plain = {name: x.detach() for name, x in inputs.items()}
    whole, state = run(plain, "reference"), HolaState.empty(1, 2, 16, 16, **SMALL, dtype=torch.float64)
    for t in range(200):
        token = {n: x[:, t] if x.ndim > 2 else x for n, x in plain.items()}
        assert relative_error(hola_attention_step(**token, state=state), whole[:, t]) < 1e-9


def test_no_sink_matches_the_definition():
    inputs = make_inputs(1, 100)
    inputs["sink"] = None
    expected, found = run(inputs, "reference"), run(inputs, "torch")
    assert relative_error(found, expected) < 1e-9


def test_value_width_may_differ_from_key_width():
    compare(make_inputs(1, 100, key=8, value=24), 1e-9, 1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packing_equals_running_each_document_alone(backend):
    cu_seqlens = [0, 70, 71, 200]
    inputs = make_inputs(1, 200)
    packed = run(inputs, backend, cu_seqlens=torch.tensor(cu_seqlens))
    together = gradients(packed, inputs)
    alone = []
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        one = {n: x[:, start:end] if x.ndim > 2 else x for n, x in inputs.items()}
        alone.append(run(one, backend))
    apart = gradients(torch.cat(alone, 1), inputs)
    assert relative_error(torch.cat(alone, 1), packed) < 1e-12
    assert all(relative_error(together[n], apart[n]) < 1e-12 for n in together)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_future_token_changes_no_earlier_output(backend):
    inputs = {n: x.detach() for n, x in make_inputs(1, 200).items()}
    before = run(inputs, backend)
    for t in (33, 64, 150, 199):
        changed = {n: x.clone() for n, x in inputs.items()}
        for name in ("q", "k", "v"):
            changed[name][:, t] *= -7.0
        changed["beta"][:, t] = 0.9999
        after = run(changed, backend)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_running_in_pieces_equals_running_whole(backend):
    inputs = make_inputs(2, 150)
    whole = run(inputs, backend)
    want = gradients(whole, inputs)
    state, pieces = None, []
    for start, end in ((0, 7), (7, 64), (64, 64), (64, 120), (120, 150)):
        piece = {n: x[:, start:end] if x.ndim > 2 else x for n, x in inputs.items()}
        o, state = run(piece, backend, state=state, return_state=True)
        pieces.append(o)
    found = torch.cat(pieces, 1)
    assert relative_error(found, whole) < 1e-10
    have = gradients(found, inputs)
    assert all(relative_error(have[n], want[n]) < 1e-9 for n in want)


def test_states_of_both_backends_are_the_same():
    inputs = {n: x.detach() for n, x in make_inputs(1, 200).items()}
    cu_seqlens = torch.tensor([0, 3, 3, 70, 198, 200])
    a, b = (run(inputs, name, cu_seqlens=cu_seqlens, return_state=True)[1] for name in ("reference", "torch"))
    for name, expected in a.tensors().items():
        found = getattr(b, name)
        assert torch.allclose(found.double(), expected.double(), atol=1e-10, rtol=1e-10), name
    assert b.cache_position.max() > 32 and (b.cache_position == -1).any()


@pytest.mark.parametrize("options", [
    {"score": "betae"}, {"score": "e"}, {"score": "recency"}, {"score": "random"}, {"slots": 0}, {"local": "none"},
    {"local": "window", "window": 7}, {"local": "window", "window": 33}, {"local": "window", "window": 70, "slots": 0}],
    ids=str)
def test_decoding_equals_the_full_pass(options):
    inputs = {n: x.detach() for n, x in make_inputs(2, 140).items()}
    whole, last = run(inputs, "torch", return_state=True, **options)
    prefix = {n: x[:, :45] if x.ndim > 2 else x for n, x in inputs.items()}
    _, state = run(prefix, "torch", return_state=True, **options)
    size = state.nbytes()
    for t in range(45, 140):
        token = {n: x[:, t] if x.ndim > 2 else x for n, x in inputs.items()}
        choices = {name: value for name, value in options.items() if name != "slots"}
        o = hola_attention_step(**token, state=state, **choices)
        assert relative_error(o, whole[:, t]) < 1e-10, t
    assert state.nbytes() == size
    assert torch.equal(state.cache_position, last.cache_position)
    assert torch.allclose(state.cache_score, last.cache_score)


def test_decoding_sequences_of_unequal_length_together():
    inputs = {n: x.detach() for n, x in make_inputs(2, 80).items()}
    cut = {n: x.flatten(0, 1)[None] if x.ndim > 2 else x for n, x in inputs.items()}
    keep = torch.cat([torch.arange(50), torch.arange(80, 101)])  # 50 tokens of one, 21 of the other
    packed = {n: x[:, keep] if x.ndim > 2 else x for n, x in cut.items()}
    _, state = run(packed, "torch", cu_seqlens=torch.tensor([0, 50, 71]), return_state=True)
    whole = run(inputs, "torch")
    for step in range(30):
        at = torch.tensor([50 + step, 21 + step])
        token = {n: x[torch.arange(2), at] if x.ndim > 2 else x for n, x in inputs.items()}
        o = hola_attention_step(**token, state=state)
        assert relative_error(o, whole[torch.arange(2), at]) < 1e-10


def test_ties_stay_with_the_earlier_token():
    score = torch.zeros(1, 40, 1)
    score[0, 12] = 1.0
    chosen = select_cache(score=score, block=8, slots=4)
    assert chosen[0, 0].tolist() == [-1, -1, -1, -1]
    assert chosen[1, 0].tolist() == [0, 1, 2, 3]
    assert chosen[4, 0].tolist() == [0, 1, 2, 12]


def test_selection_is_the_top_of_all_earlier_blocks():
    score = torch.rand(1, 300, 3, generator=torch.Generator().manual_seed(4)).double()
    chosen = select_cache(score=score, block=32, slots=10, cu_seqlens=torch.tensor([0, 100, 300]))
    for block, (start, end) in enumerate([(0, 0), (0, 32), (0, 64), (0, 96), (100, 100), (100, 132), (100, 164)]):
        for head in range(3):
            best = score[0, start:end, head].topk(min(10, end - start)).indices + start
            have = [r for r in chosen[block, head].tolist() if r >= 0]
            assert have == sorted(best.tolist())


def test_score_is_the_size_of_the_state_update():
    inputs = {n: x.detach() for n, x in make_inputs(1, 70).items()}
    state = None
    for t in range(70):
        token = {n: inputs[n][:, t: t + 1] for n in ("q", "k", "v", "log_decay", "beta")}
        _, score, after = gated_delta_rule(**token, initial_state=state, backend="torch")
        before = torch.zeros_like(after) if state is None else state
        update = after - token["log_decay"].exp()[0, 0, :, None, None] * before
        assert torch.allclose(score[0, 0], update[0].flatten(1).norm(dim=-1), rtol=1e-6)
        state = after


def test_wrong_arguments_are_named():
    inputs = {n: x.detach() for n, x in make_inputs(1, 8).items()}
    with pytest.raises(KernelError, match="backend: 'cuda' is not one of"):
        run(inputs, "cuda")
    with pytest.raises(KernelError, match="score: 'surprise' is not one of"):
        run(inputs, "torch", score="surprise")
    with pytest.raises(KernelError, match="beta .* must be"):
        run({**inputs, "beta": inputs["beta"][:, :4]}, "torch")
    with pytest.raises(KernelError, match="cu_seqlens must be integers rising"):
        run(inputs, "torch", cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(KernelError, match="state has"):
        run(inputs, "torch", state=HolaState.empty(1, 2, 16, 16, block=16, slots=8))
