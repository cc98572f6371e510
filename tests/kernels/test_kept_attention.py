"""Attention to kept tokens: backends against the definition, the definition against dense attention, decoding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from inputs import gradients, relative_error

from hola_kernels import KeptTokens, KernelError, kept_attention, kept_attention_step
from hola_kernels.kept_attention import torch_chunks
from hola_kernels.kept_attention.tiles import kept_refusal, kept_width_refusal, shared_memory_refusal

BACKENDS = ["reference", "torch"]
LENGTHS = (1, 63, 64, 65, 255, 257, 500, 1000)
PACKINGS = {"one": [0, 90], "ragged": [0, 1, 40, 104, 105, 150], "empty": [0, 0, 64, 64, 65, 129, 129]}
CHOICES = ("random", "all", "none", "heads")


def make(batch, length, *, heads=2, key=8, value=12, choice="random", dtype=torch.float64, seed=0):
    """Arguments of kept_attention with gradients on."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    share = {"random": 0.3, "all": 1.0, "none": 0.0}.get(choice)
    # "heads": the first keeps none, the last all
    share = torch.linspace(0, 1, heads) if share is None else torch.full((heads,), share)
    made = {"q": normal(batch, length, heads, key), "k": 2 * normal(batch, length, heads, key),
            "v": normal(batch, length, heads, value), "sink": normal(heads),
            "log_weight": normal(batch, length, heads).sigmoid().log()}
    made = {n: x.to(dtype).requires_grad_() for n, x in made.items()}
    return made | {"keep": torch.rand(batch, length, heads, generator=g) < share}


def dense(q, k, v, keep, sink, log_weight, cu_seqlens=None):
    """Softmax attention with a [T, T] mask."""
    length = q.shape[1]
    logits = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    document = torch.zeros(length)
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(length), cu_seqlens[1:], right=True)
    earlier = torch.ones(length, length, dtype=torch.bool).tril(-1) & (document[:, None] == document)
    own = torch.eye(length, dtype=torch.bool)
    bias = log_weight.permute(0, 2, 1)[:, :, None].masked_fill(own, 0)
    seen = own | (earlier & keep.permute(0, 2, 1)[:, :, None])
    logits = (logits + bias).masked_fill(~seen, -torch.inf)
    logits = torch.cat([logits, sink[:, None, None].expand(*logits.shape[:3], 1)], -1)
    return torch.einsum("bhij,bjhv->bihv", logits.softmax(-1)[..., :-1], v)


def compare(inputs, tolerance_forward, tolerance_gradient, definition=None, **options):
    """The torch backend on `inputs` against the reference on `definition` (the same in float64)."""
    definition = definition or inputs
    expected = kept_attention(**definition, backend="reference", **options)
    found = kept_attention(**inputs, backend="torch", **options)
    assert relative_error(found, expected) < tolerance_forward
    want, have = gradients(expected, definition), gradients(found, inputs)
    worst = {name: relative_error(have[name], want[name]) for name in want if want[name].norm() > 0}
    assert worst and max(worst.values()) < tolerance_gradient, worst
    assert not any(have[name].any() for name in want if not want[name].any())


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 1, 20, 51]], ids=["rows", "packed"])
def test_the_definition_is_dense_attention_with_a_mask(choice, cu_seqlens):
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    inputs = make(2 if cu_seqlens is None else 1, 51, choice=choice)
    found = kept_attention(**inputs, cu_seqlens=cu, backend="reference")
    expected = dense(**inputs, cu_seqlens=cu)
    assert relative_error(found, expected) < 1e-12
    want, have = gradients(expected, inputs), gradients(found, inputs)
    assert all(torch.allclose(have[n], want[n], rtol=1e-9, atol=1e-12) for n in want)


@pytest.mark.parametrize("length", LENGTHS)
def test_float64_matches_the_definition(length):
    compare(make(2 if length < 64 else 1, length, heads=2 if length < 100 else 1), 1e-9, 1e-9)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_documents_match_the_definition(packing, choice, monkeypatch):
    monkeypatch.setattr(torch_chunks, "CHUNK", 32)
    cu_seqlens = PACKINGS[packing]
    compare(make(1, cu_seqlens[-1], heads=3, choice=choice), 1e-9, 1e-9,
            cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))


@pytest.mark.parametrize("left_out", [("sink",), ("log_weight",), ("sink", "log_weight")], ids="+".join)
def test_without_sink_or_weights(left_out):
    inputs = {n: x for n, x in make(1, 70).items() if n not in left_out}
    compare(inputs, 1e-9, 1e-9, scale=0.7)


@pytest.mark.parametrize("length", [65, 257])
def test_float32_is_within_the_contract(length):
    inputs = make(1, length, dtype=torch.float32, key=32, value=32)
    exact = {n: x if n == "keep" else x.detach().double().requires_grad_() for n, x in inputs.items()}
    compare(inputs, 1e-5, 1e-4, definition=exact)


def test_a_weight_of_zero_is_a_token_that_is_not_kept():
    inputs = make(1, 40)
    dropped = torch.rand(1, 40, 2, generator=torch.Generator().manual_seed(4)) < 0.5
    silenced = {**inputs, "log_weight": inputs["log_weight"].detach().masked_fill(dropped, -math.inf).requires_grad_()}
    for backend in BACKENDS:
        expected = kept_attention(**{**inputs, "keep": inputs["keep"] & ~dropped}, backend=backend)
        found = kept_attention(**silenced, backend=backend)
        assert relative_error(found, expected) < 1e-12
        assert all(x.isfinite().all() for x in gradients(found, silenced).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_never_changes_the_past(backend):
    inputs = {n: x.detach() for n, x in make(1, 80).items()}
    whole = kept_attention(**inputs, backend=backend)
    other = {n: x.detach() for n, x in make(1, 80, seed=9).items()}
    for t in (0, 1, 37, 78):
        changed = {n: x if n == "sink" else torch.cat([x[:, : t + 1], other[n][:, t + 1:]], 1)
                   for n, x in inputs.items()}
        assert relative_error(kept_attention(**changed, backend=backend)[:, : t + 1], whole[:, : t + 1]) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_must_not_be_read(backend):
    """Keys, values and weights of tokens that are not kept reach nobody but the tokens themselves."""
    inputs = {n: x.detach() for n, x in make(1, 80, choice="heads", heads=3).items()}
    clean = kept_attention(**inputs, backend=backend)
    spoiled = {**inputs, "log_weight": inputs["log_weight"].masked_fill(~inputs["keep"], math.nan)}
    for n in ("k", "v"):
        spoiled[n] = inputs[n].masked_fill(~inputs["keep"][..., None], math.nan)
    found = kept_attention(**spoiled, backend=backend)
    assert torch.equal(found[inputs["keep"]], clean[inputs["keep"]]) and found[~inputs["keep"]].isnan().all()


def test_long_documents_hold_no_square_of_their_length():
    """Bytes that the backward pass holds of a document: in proportion to its length, whatever it keeps."""
    def held(length):
        inputs, seen = make(1, length, heads=1, choice="all", dtype=torch.float32), {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            kept_attention(**inputs, backend="torch").sum().backward()
        return sum(seen.values())

    assert held(4096) < 3 * held(2048)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [True, False])
def test_pieces_and_steps_equal_the_whole(backend, weighted):
    """Two sequences whose heads keep different numbers of tokens; the room doubles on the way."""
    inputs = {n: x.detach() for n, x in make(2, 60, heads=3, choice="heads").items()}
    if not weighted:
        del inputs["log_weight"]
    whole = kept_attention(**inputs, backend=backend)
    state = KeptTokens.empty(2, 3, 8, 12, capacity=2, dtype=torch.float64)
    pieces = []
    for start, end in itertools.pairwise((0, 1, 20, 20, 45)):
        piece = {n: x if n == "sink" else x[:, start:end] for n, x in inputs.items()}
        pieces.append(kept_attention(**piece, state=state, backend=backend))
    for t in range(45, 60):
        one = {n: x if n == "sink" else x[:, t] for n, x in inputs.items()}
        pieces.append(kept_attention_step(**one, state=state, backend=backend)[:, None])
    assert relative_error(torch.cat(pieces, 1), whole) < 1e-12
    keep = inputs["keep"]
    assert torch.equal(state.count, keep.sum(1)) and state.length.tolist() == [60, 60] and state.capacity == 64
    for n, h in itertools.product(range(2), range(3)):
        kept = torch.nonzero(keep[n, :, h]).squeeze(1)
        assert torch.equal(state.position[n, : len(kept), h], kept)
        assert torch.equal(state.k[n, : len(kept), h], inputs["k"][n, kept, h])
        assert torch.equal(state.v[n, : len(kept), h], inputs["v"][n, kept, h])


def test_steps_read_nothing_that_was_not_kept():
    inputs = {n: x.detach() for n, x in make(1, 12).items()}
    states = [KeptTokens.empty(1, 2, 8, 12, capacity=4, dtype=torch.float64) for _ in range(2)]
    for t in range(12):
        one = {n: x if n == "sink" else x[:, t] for n, x in inputs.items()}
        bad = {**one, "v": one["v"].masked_fill(~one["keep"][..., None], math.inf)}
        clean, found = (kept_attention_step(**x, state=state) for x, state in zip((one, bad), states, strict=True))
        assert torch.equal(found[one["keep"]], clean[one["keep"]])


def test_a_selection_of_sequences_goes_on_alone():
    inputs = {n: x.detach() for n, x in make(3, 20).items()}
    state = KeptTokens.empty(3, 2, 8, 12, dtype=torch.float64)
    first, rest = ({n: x if n == "sink" else x[:, part] for n, x in inputs.items()}
                   for part in (slice(0, 12), slice(12, 20)))
    kept_attention(**first, state=state)
    rows = torch.tensor([2, 0])
    chosen = state.select(rows)
    expected = kept_attention(**rest, state=state)[rows]
    found = kept_attention(**{n: x if n == "sink" else x[rows] for n, x in rest.items()}, state=chosen)
    assert relative_error(found, expected) < 1e-12 and chosen.nbytes() < state.nbytes()


def test_wrong_arguments_are_named():
    inputs = {n: x.detach() for n, x in make(2, 5).items()}
    state = KeptTokens.empty(2, 2, 8, 12)
    for spoiled, message in (({"keep": inputs["keep"].float()}, "keep torch.float32 .* must be torch.bool"),
                             ({"keep": inputs["keep"][:, :3]}, "keep .* must be torch.bool"),
                             ({"sink": inputs["sink"][:1]}, "sink .* must be"),
                             ({"log_weight": inputs["log_weight"][:1]}, "log_weight .* must be"),
                             ({"scale": math.nan}, "scale = nan must be a finite number"),
                             ({"state": "x"}, "state must be a KeptTokens"),
                             ({"state": KeptTokens.empty(1, 2, 8, 12)}, "state.k .* must be"),
                             ({"state": state, "cu_seqlens": torch.tensor([0, 5])}, "state goes with sequences of one"),
                             ({"state": state, "v": inputs["v"].clone().requires_grad_()}, "v needs a gradient")):
        with pytest.raises(KernelError, match=message):
            kept_attention(**{**inputs, **spoiled})
    with pytest.raises(KernelError, match="capacity = 0 must be"):
        KeptTokens.empty(1, 1, 8, 8, capacity=0)
    with pytest.raises(KernelError, match=r"q .* must be \[N, H, K\]"):
        kept_attention_step(**inputs, state=state)


def test_second_derivatives_go_through_chunks_that_are_computed_again(monkeypatch):
    monkeypatch.setattr(torch_chunks, "CHUNK", 8)
    inputs = make(1, 20, heads=1, key=4, value=4)

    def twice(backend):
        slope = torch.autograd.grad(kept_attention(**inputs, backend=backend).square().sum(), inputs["k"],
                                    create_graph=True)[0]
        return torch.autograd.grad(slope.square().sum(), [inputs[n] for n in ("q", "k", "v", "sink", "log_weight")])

    assert all(relative_error(a, b) < 1e-9 for a, b in zip(twice("torch"), twice("reference"), strict=True))


def test_what_the_kernels_do_not_take_is_named():
    bf16, float32, odd = (torch.zeros(1, 1, 1, width, dtype=dtype) for width, dtype in (
        (64, torch.bfloat16), (64, torch.float32), (48, torch.bfloat16)))
    assert kept_refusal(bf16, bf16, bf16) is None
    assert "one of float32, float16 and bfloat16, not torch.float32" in kept_refusal(float32, bf16, bf16)
    assert "not torch.float64" in kept_refusal(*[float32.double()] * 3)
    assert "K of 32 and more in float32, not 16" in kept_width_refusal(16, torch.float32)
    assert kept_width_refusal(16, torch.bfloat16) is None and kept_width_refusal(32, torch.float32) is None
    assert "K and V of 16, 32, 64, 128, 256, not 64 and 48" in kept_refusal(bf16, bf16, odd)
    assert shared_memory_refusal("H200", 232_448, torch.bfloat16, 256) is None
    assert "K or V = 128 in bfloat16 needs 131,856 bytes" in shared_memory_refusal("L4", 101_376, torch.bfloat16, 128)
