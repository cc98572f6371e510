"""HAM layers against a loop over tokens in float64: both routers, packing, gradients, decoding, the threshold."""

from __future__ import annotations

import itertools

import pytest
import torch
from inputs import make_inputs, relative_error

from hola_kernels import KernelError, gated_delta_rule
from hola_kernels.gated_delta.residual import gated_delta_residual
from hola_kernels.ham import ham_attention
from hola_kernels.modules import HamAttention, LayerCache

H, K, V, D, R = 2, 8, 12, 24, 5
ROUTERS = ("cosine", "learned")
PACKED = (0, 0, 1, 33, 33, 50, 60)
START = {"cosine": 1.0, "learned": 0.5}


def layer(router="cosine", threshold=None, **changes) -> HamAttention:
    torch.manual_seed(0)
    start = START[router] if threshold is None else threshold
    made = HamAttention(D, H, K, V, router=router, threshold=start, init_std=0.3, router_width=R, **changes).double()
    with torch.no_grad():
        for norm in (made.o_norm.weight, made.gamma_q, made.gamma_k):
            norm.copy_(1 + 0.3 * torch.randn(norm.shape))
        if router == "learned":
            made.route_out.copy_(torch.randn(H, R))
            made.route_bias.copy_(torch.tensor([-0.2, 0.3]))
    return made


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def scaled(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def convolved(made: HamAttention, name: str, rows: list) -> torch.Tensor:
    """SiLU of the short convolution at the newest of the document's tokens."""
    weight, project = getattr(made, f"{name}_conv").weight, getattr(made, f"{name}_proj").weight
    width = weight.shape[1]
    y = sum(weight[:, width - 1 - back] * (project @ x) for back, x in enumerate(reversed(rows[-width:])))
    return (y * sigmoid(y)).view(H, -1)


def defined(made: HamAttention, x_TD, bounds) -> tuple[torch.Tensor, list[list[bool]]]:
    """The layer of T tokens, one after the other, from the formulas; and which tokens every head keeps."""
    out, choices, tau = [], [], made.controller.threshold
    for start, end in itertools.pairwise(bounds):
        state, kept = x_TD.new_zeros(H, K, V), [[] for _ in range(H)]  # of each head: (key, value, log weight)
        for t in range(start, end):
            x = x_TD[t]
            q, k, v = (convolved(made, name, list(x_TD[start: t + 1])) for name in "qkv")
            step = torch.log1p(torch.exp(made.a_proj.weight @ x + made.dt_bias)) if made.rule == "gdn" else 0.0
            alpha = torch.exp(-torch.exp(made.A_log) * step) if made.rule == "gdn" else x.new_ones(H)
            beta = made.beta_range * sigmoid(made.b_proj.weight @ x)
            gates = sigmoid(made.mix_proj.weight @ x).view(H, 2)
            heads, chosen, states = [], [], []
            for h in range(H):
                decayed = alpha[h] * state[h]
                answer = unit(k[h]) @ decayed
                states.append(decayed + beta[h] * torch.outer(unit(k[h]), v[h] - answer))
                o_state = unit(q[h]) @ states[h] * K ** -0.5
                if made.router == "cosine":
                    norms = answer.norm() * v[h].norm()
                    score, weight = 1 - (answer @ v[h]) / norms if norms > 0 else x.new_ones(()), x.new_zeros(())
                else:
                    u = made.route_proj.weight[h * R: h * R + R] @ x
                    score = sigmoid(made.route_out[h] @ (u * sigmoid(u)) + made.route_bias[h])
                    weight = torch.log(score)
                key = scaled(k[h], made.gamma_k)
                seen = [*kept[h], (key, v[h], x.new_zeros(()))]
                query = scaled(q[h], made.gamma_q)
                logits = torch.stack([query @ other * K ** -0.5 + w for other, _, w in seen])
                weights = torch.softmax(logits, 0)
                o_exact = sum(weights[j] * seen[j][1] for j in range(len(seen)))
                if score >= tau:
                    kept[h].append((key, v[h], weight))
                chosen.append(bool(score >= tau))
                heads.append(gates[h, 0] * o_state + gates[h, 1] * o_exact)
            state = torch.stack(states)
            gate = (made.g_proj.weight @ x).view(H, V)
            normed = scaled(torch.stack(heads), made.o_norm.weight) * gate * sigmoid(gate)
            out.append(made.o_proj.weight @ normed.flatten())
            choices.append(chosen)
    return torch.stack(out), choices


def given(length, batch=1, seed=3):
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("bounds", [(0, 53), PACKED], ids=["one", "packed"])
def test_float64_is_the_definition_with_every_gradient(router, bounds, backend):
    made, x = layer(router, beta_range=2, backend=backend), given(bounds[-1]).requires_grad_()
    found, (want, choices) = made(x, cu_seqlens=torch.tensor(bounds))[0], defined(made, x[0], bounds)
    kept = sum(map(sum, choices))
    assert 0.2 < kept / (H * bounds[-1]) < 0.9  # some are kept, some are not
    assert made.controller.counted.tolist() == [kept, H * bounds[-1]]
    assert relative_error(found, want) < 1e-9
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [x, *made.parameters()]
    have, expected = (torch.autograd.grad((y * weight).sum(), wanted) for y in (found, want))
    for (name, _), a, b in zip([("x", x), *made.named_parameters()], have, expected, strict=True):
        assert relative_error(a, b) < 1e-9, name
        assert b.abs().max() > 0, name  # a learned router's too


@pytest.mark.parametrize(("router", "threshold"), [("cosine", -1.0), ("cosine", 3.0), ("learned", 0.0)])
def test_all_or_nothing_is_the_definition(router, threshold):
    made, x = layer(router, threshold, rule="delta"), given(20)
    assert relative_error(made(x)[0], defined(made, x[0], (0, 20))[0]) < 1e-9


@pytest.mark.parametrize("initial", [False, True], ids=["no_state", "state"])
@pytest.mark.parametrize("bounds", [(0, 150), (0, 1, 1, 64, 129, 150)], ids=["one", "packed"])
def test_residuals_in_chunks_are_the_definition(bounds, initial):
    x = {name: y.detach() for name, y in make_inputs(1, 150).items() if name in ("q", "k", "v", "log_decay", "beta")}
    cu_seqlens, state = torch.tensor(bounds), None
    if initial:
        state = torch.randn(len(bounds) - 1, 2, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q = x.pop("q")
    want, found = (gated_delta_residual(**x, cu_seqlens=cu_seqlens, initial_state=state, backend=backend)
                   for backend in ("reference", "torch"))
    assert relative_error(found, want) < 1e-11
    score = gated_delta_rule(q=q, **x, cu_seqlens=cu_seqlens, initial_state=state)[1]
    assert relative_error(x["beta"] * found.norm(dim=-1), score) < 1e-11


@pytest.mark.parametrize("router", ROUTERS)
def test_rows_are_documents_and_nothing_leaks(router):
    made, x, bounds = layer(router).eval(), given(35, batch=2), torch.tensor([0, 35, 70])
    both = made(x)
    packed = made(x.flatten(0, 1)[None], cu_seqlens=bounds)
    assert relative_error(packed[0], both.flatten(0, 1)) < 1e-12
    x[0] += 1.0
    assert torch.equal(made(x)[1], both[1])
    assert torch.equal(made(x.flatten(0, 1)[None], cu_seqlens=bounds)[0, 35:], packed[0, 35:])


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_any_cut_of_the_input_is_the_whole_call_and_the_memory_grows(router):
    made, x = layer(router, {"cosine": 0.7, "learned": 0.4}[router]), given(150, batch=2)
    whole = made(x)
    for lengths in ([150], [1] * 150, [20, 1, 1, 13, 115], [5, 3, 2, 140], [100, 1, 49]):
        cache, parts, sizes = LayerCache(), [], []
        for part in x.split(lengths, 1):
            parts.append(made(part, cache=cache))
            sizes.append(cache.nbytes())
        assert relative_error(torch.cat(parts, 1), whole) < 1e-9, lengths
        assert cache.state.kept.length.tolist() == [150, 150]
        assert (cache.state.kept.count > 0).all() and (cache.state.kept.count < 150).all()
        assert len(lengths) < 100 or sizes[-1] > sizes[0]


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_sequences_of_unequal_length_go_on_together(router):
    made, x = layer(router), given(60, batch=3)
    whole, starts, cache = made(x), [0, 0, 0], LayerCache()
    for lengths in ([21, 0, 37], [4, 9, 0], [0, 0, 0], [17, 30, 2]):
        rows = [x[n, starts[n]: starts[n] + lengths[n]] for n in range(3)]
        parts = made(torch.cat(rows)[None], cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), cache=cache)[0]
        for n, part in enumerate(parts.split(lengths)):
            assert torch.allclose(part, whole[n, starts[n]: starts[n] + lengths[n]], atol=1e-9)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
        assert cache.state.kept.length.tolist() == starts
    for step in range(15):
        at = torch.tensor([n + step for n in starts])
        one = made(x[torch.arange(3), at][:, None], cache=cache)[:, 0]
        assert torch.allclose(one, whole[torch.arange(3), at], atol=1e-9)


@pytest.mark.parametrize("router", ROUTERS)
def test_float32_is_close_and_every_parameter_has_a_gradient(router):
    made, x = layer(router).float(), given(100).float()
    y = made(x)
    assert relative_error(y, layer(router)(x.double())) < 1e-5
    y.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())


def test_the_threshold_follows_the_share_in_training_only():
    """The layer is trained; the share of what it keeps comes to the target, which scores alone would leave."""
    for router, target in itertools.product(ROUTERS, (0.2, 0.6)):
        made = layer(router, share=target, rate=0.2).float()
        optimizer = torch.optim.Adam(made.parameters(), 3e-3)
        wanted, shares = given(40, batch=4, seed=9).float(), []
        for step in range(150):
            optimizer.zero_grad()
            (made(given(40, batch=4, seed=step % 5).float()) - wanted).square().mean().backward()
            optimizer.step()
            kept, every = made.controller.counted.tolist()
            shares.append(kept / every)
            made.end_step()
        assert sum(shares[-30:]) / 30 == pytest.approx(target, abs=0.03), router
        with torch.no_grad():
            made(given(40).float())
        made.eval()(given(40).float())
        assert made.controller.counted.tolist() == [0, 0] and float(made.controller.updates) == 150


def test_wrong_arguments_are_named():
    q, v, beta = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 6), torch.rand(1, 4, 2)
    good = {"q": q, "k": q, "v": v, "beta": beta, "log_decay": -beta, "mix": torch.randn(1, 4, 2, 2),
            "gamma_q": torch.ones(8), "gamma_k": torch.ones(8), "threshold": torch.ones(1)}
    for change, message in (({"mix": v}, r"mix \(1, 4, 2, 6\) must be \(1, 4, 2, 2\)"),
                         ({"threshold": torch.ones(())}, r"threshold \(\) must be \[1\]"),
                         ({"gamma_k": torch.ones(6)}, r"gamma_k \(6,\) must be \[8\]"),
                         ({"route": v}, r"route \(1, 4, 2, 6\) must be")):
        with pytest.raises(KernelError, match=message):
            ham_attention(**good | change)
    for change, message in (({"router": "mean"}, "router: 'mean' is not one of cosine, learned"),
                         ({"state_delay": 3}, "state_delay: 3 is for GatedDeltaNet"),
                         ({"router_width": 0}, "router_width = 0 must be a whole number"),
                         ({"share": 1.5}, "target = 1.5 must be a finite number")):
        with pytest.raises(KernelError, match=message):
            HamAttention(8, 1, 4, **change)
