"""HQLT layers against a loop over tokens in float64: every blend and mixing, packing, gradients, decoding."""

from __future__ import annotations

import sys

import pytest
import torch
from inputs import relative_error
from varlen import stand_in

from hola_kernels import KernelError
from hola_kernels.hqlt import BLENDS, MIXINGS, flash_window, hqlt_attention
from hola_kernels.modules import HqltAttention, LayerCache

H, K, V, W, D = 2, 8, 12, 16, 24
EVERY = [(blend, mixing) for blend in BLENDS for mixing in MIXINGS]


def layer(blend="sync", mixing="vector", **changes) -> HqltAttention:
    torch.manual_seed(0)
    made = HqltAttention(D, H, K, V, blend=blend, mixing=mixing, init_std=0.3, **{"window": W} | changes).double()
    with torch.no_grad():
        made.o_norm.weight.copy_(1 + 0.3 * torch.randn(V))
    return made


def silu(x):
    return x / (1 + torch.exp(-x))


def rotated(x, position, theta):
    """[H, K] rotated: pairs (i, i + K / 2) by position * theta^(-2 i / K)."""
    half, out = K // 2, x.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-2 * i / K), dtype=torch.float64)
        a, b = x[:, i], x[:, i + half]
        out = torch.cat([out[:, :i], (a * angle.cos() - b * angle.sin())[:, None], out[:, i + 1:]], 1)
        out = torch.cat([out[:, :i + half], (b * angle.cos() + a * angle.sin())[:, None], out[:, i + half + 1:]], 1)
    return out


def defined(made: HqltAttention, x_TD, bounds) -> torch.Tensor:
    """The layer of T tokens, one after the other, from the formulas."""
    out = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        states, q, k, v, window = [x_TD.new_zeros(H, K, V)], [], [], [], made.window
        for t in range(end - start):
            x = x_TD[start + t]
            q.append((made.q_proj.weight @ x).view(H, K))
            k.append((made.k_proj.weight @ x).view(H, K))
            v.append(silu((made.v_proj.weight @ x).view(H, V)))
            beta = made.beta_range / (1 + torch.exp(-(made.b_proj.weight @ x)))
            uk, uq = (silu(y) / (silu(y).square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (k[t], q[t]))
            residual = v[t] - (states[-1] * uk[:, :, None]).sum(1)
            states.append(states[-1] + beta[:, None, None] * uk[:, :, None] * residual[:, None])
            known = {"sync": t + 1, "delayed_stream": max(t + 1 - window, 0),
                     "delayed_chunk": t // window * window}[made.blend]
            o_state = (states[known] * uq[:, :, None]).sum(1) * K ** -0.5
            first = t // window * window if made.blend == "delayed_chunk" else max(t - window + 1, 0)
            here = rotated(q[t], t, made.rope_theta)
            logits = torch.stack([(here * rotated(k[j], j, made.rope_theta)).sum(-1) for j in range(first, t + 1)])
            weights = torch.softmax(logits * K ** -0.5, 0)
            o_soft = sum(weights[j - first][:, None] * v[j] for j in range(first, t + 1))
            if made.mixing == "sum":
                o = o_state + o_soft
            else:
                gate = 1 / (1 + torch.exp(-(made.mix_proj.weight @ x))).view(H, -1)
                o = gate * o_state + (1 - gate) * o_soft if made.mixing == "vector" else \
                    gate[:, :1] * o_state + gate[:, 1:] * o_soft
            normed = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * made.o_norm.weight
            out.append(made.o_proj.weight @ normed.flatten())
    return torch.stack(out)


def given(length, batch=1, seed=3):
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("blend", "mixing"), EVERY)
@pytest.mark.parametrize("bounds", [(0, 53), (0, 0, 1, 33, 33, 50, 60)], ids=["one", "packed"])
def test_float64_is_the_definition_with_every_gradient(blend, mixing, bounds):
    made, x = layer(blend, mixing, beta_range=2), given(bounds[-1]).requires_grad_()
    found, want = made(x, cu_seqlens=torch.tensor(bounds))[0], defined(made, x[0], bounds)
    assert relative_error(found, want) < 1e-9
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [x, *made.parameters()]
    have, expected = (torch.autograd.grad((y * weight).sum(), wanted) for y in (found, want))
    for (name, _), a, b in zip([("x", x), *made.named_parameters()], have, expected, strict=True):
        assert relative_error(a, b) < 1e-9, name


@pytest.fixture
def flash(monkeypatch):
    """What flash attention was called with, by the stand-in that every call is taken by."""
    import torch.nn.attention.varlen as varlen

    seen = {}
    monkeypatch.setattr(varlen, "varlen_attn", stand_in(seen))
    monkeypatch.setattr(flash_window, "flash_refusal", lambda q, v: None)
    monkeypatch.setattr(sys.modules["hola_kernels.hqlt"], "choose_backend", lambda *_: "triton")
    return seen


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize(("bounds", "rows"), [((0, 53), 1), ((0, 0, 1, 33, 33, 49, 60, 60), 1), (None, 2)])
def test_the_window_by_flash_attention_is_the_definition(flash, blend, bounds, rows):
    """Its own function has no CPU form: the definition of that one is called instead."""
    made, x = layer(blend), given((bounds or (60,))[-1], batch=rows).requires_grad_()
    found = made(x, cu_seqlens=None if bounds is None else torch.tensor(bounds))
    want = torch.stack([defined(made, row, bounds or (0, 60)) for row in x])
    assert relative_error(found, want) < 1e-9
    assert flash["window"] == ((-1, 0) if blend == "delayed_chunk" else (W - 1, 0))
    wanted = [x, *made.parameters()]
    have, expected = (torch.autograd.grad(y.square().sum(), wanted) for y in (found, want))
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(have, expected, strict=True))


@pytest.mark.parametrize("blend", BLENDS)
def test_more_documents_than_a_call_of_flash_attention_takes_are_read_in_bands(monkeypatch, flash, blend):
    monkeypatch.setattr(flash_window, "MOST_DOCUMENTS", 3)
    made, x = layer(blend), given(60)
    for bounds in ((0, 20, 60), (0, 1, 2, 3, 60)):
        flash.clear()
        found = made(x, cu_seqlens=torch.tensor(bounds))
        assert relative_error(found[0], defined(made, x[0], bounds)) < 1e-9
        assert bool(flash) == (blend != "delayed_chunk" and len(bounds) == 3)  # 60 tokens have room for 3 more chunks


@pytest.mark.parametrize("blend", BLENDS)
def test_small_chunks_are_read_in_bands(flash, blend):
    """For each of them flash attention would hold 128 rows more."""
    made, x = layer(blend, window=15), given(60)
    assert relative_error(made(x)[0], defined(made, x[0], (0, 60))) < 1e-9
    assert bool(flash) == (blend != "delayed_chunk")


def test_chunks_are_documents():
    """Of 5 tokens; as many as there is room for, whatever the lengths."""
    chunks = flash_window.chunks_of(torch.tensor([0, 0, 7, 8, 18]), 18, 5)
    assert chunks.host().tolist() == [0, 5, 7, 8, 13, 18, 18, 18] and chunks.max_seqlen == 5


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("window", [1, 7, 64])
def test_other_windows_are_the_definition(blend, window):
    made, x = layer(blend, window=window), given(40)
    assert relative_error(made(x)[0], defined(made, x[0], (0, 40))) < 1e-9


@pytest.mark.parametrize("blend", BLENDS)
def test_rows_are_documents_and_nothing_leaks(blend):
    made, x = layer(blend), given(35, batch=2)
    both = made(x)
    packed = made(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 35, 70]))
    assert relative_error(packed[0], both.flatten(0, 1)) < 1e-12
    x[0] += 1.0
    assert torch.equal(made(x)[1], both[1])
    assert torch.equal(made(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 35, 70]))[0, 35:], packed[0, 35:])


@pytest.mark.parametrize(("blend", "mixing"), EVERY)
@torch.no_grad()
def test_any_cut_of_the_input_is_the_whole_call(blend, mixing):
    made, x = layer(blend, mixing), given(70, batch=2)
    whole = made(x)
    for bounds in ([70], [1] * 70, [20, 1, 1, 13, 35], [16, 16, 38], [5, 3, 2, 60], [33, 1, 36]):
        cache, parts = LayerCache(), []
        for part in x.split(bounds, 1):
            parts.append(made(part, cache=cache))
        assert relative_error(torch.cat(parts, 1), whole) < 1e-9, bounds


@pytest.mark.parametrize("blend", BLENDS)
@torch.no_grad()
def test_sequences_of_unequal_length_go_on_together(blend):
    made, x = layer(blend), given(60, batch=3)
    whole, starts, cache = made(x), [0, 0, 0], LayerCache()
    for lengths in ([21, 0, 37], [4, 9, 0], [17, 30, 2]):
        rows = [x[n, starts[n]: starts[n] + lengths[n]] for n in range(3)]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        parts = made(torch.cat(rows)[None], cu_seqlens=bounds, cache=cache)[0].split(lengths)
        for n, part in enumerate(parts):
            assert torch.allclose(part, whole[n, starts[n]: starts[n] + lengths[n]], atol=1e-9)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    held = cache.nbytes()
    for step in range(15):
        at = torch.tensor([n + step for n in starts])
        one = made(x[torch.arange(3), at][:, None], cache=cache)[:, 0]
        assert torch.allclose(one, whole[torch.arange(3), at], atol=1e-9)
    assert cache.nbytes() == held


def test_float32_is_close_and_every_parameter_has_a_gradient():
    for blend in BLENDS:
        made, x = layer(blend).float(), given(100).float()
        y = made(x)
        assert relative_error(y, layer(blend)(x.double())) < 1e-5
        y.square().mean().backward()
        assert all(p.grad.abs().sum() > 0 for p in made.parameters())


def test_wrong_arguments_are_named():
    q, v, beta = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 6), torch.rand(1, 4, 2)
    good = {"q": q, "k": q, "v": v, "beta": beta, "mix": v}
    for change, message in (({"blend": "late"}, "blend: 'late' is not one of"), ({"window": 0}, "window = 0 must be"),
                         ({"mixing": "scalar"}, r"mix \(1, 4, 2, 6\) must be \(1, 4, 2, 2\)"),
                         ({"mix": None}, "mix None must be"), ({"rope_theta": -1.0}, "rope_theta = -1.0 must be"),
                         ({"q": q[..., :7], "k": q[..., :7]}, "even K")):
        with pytest.raises(KernelError, match=message):
            hqlt_attention(**good | change)
    with pytest.raises(KernelError, match="mixing: 'mean' is not one of"):
        HqltAttention(8, 1, 4, mixing="mean")
