"""Several writes a token, against a loop over writes in float64: outputs, every gradient, packing, decoding."""

from __future__ import annotations

import pytest
import torch
from inputs import gradients, relative_error

from hola_kernels import KernelError
from hola_kernels.delta_product import gated_delta_product, gated_delta_product_step
from hola_kernels.modules import GatedDeltaProduct, LayerCache
from hola_kernels.norms import l2_normalize

BOUNDS = {"one": (0, 70), "ragged": (0, 1, 40, 104, 105, 150), "empty": (0, 0, 32, 32, 65, 97, 97)}


def tokens_of(length: int, writes: int, rows: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(rows, length, *shape, generator=generator, dtype=torch.float64)

    made = {"q": normal(2, 8), "k": normal(writes, 2, 8), "v": normal(writes, 2, 6),
            "log_decay": -0.1 * normal(2).square(), "beta": 2 * normal(writes, 2).sigmoid()}
    return {name: x.requires_grad_() for name, x in made.items()}


def by_loop(q, k, v, log_decay, beta, bounds):
    """o [M, H, V] of one row: a product of (I - beta k k') and additions, one write after the other."""
    outputs = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        state = torch.zeros(2, 8, 6, dtype=torch.float64)
        for t in range(start, end):
            state = log_decay[t].exp()[:, None, None] * state
            for i in range(k.shape[1]):
                unit, strength = l2_normalize(k[t, i]), beta[t, i][:, None, None]
                householder = torch.eye(8, dtype=torch.float64) - strength * unit[:, :, None] * unit[:, None]
                state = householder @ state + strength * unit[:, :, None] * v[t, i][:, None]
            outputs.append((l2_normalize(q[t])[:, None] @ state).squeeze(1) * 8 ** -0.5)
    return torch.stack(outputs)


@pytest.mark.parametrize("packing", BOUNDS)
@pytest.mark.parametrize("writes", [1, 2, 3])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float64_matches_the_loop(backend, writes, packing):
    bounds = BOUNDS[packing]
    inputs = tokens_of(bounds[-1], writes)
    expected = by_loop(*(x[0] for x in inputs.values()), bounds)[None]
    given = None if packing == "one" else torch.tensor(bounds)
    found, _ = gated_delta_product(**inputs, cu_seqlens=given, backend=backend)
    assert relative_error(found, expected) < 1e-9
    have, want = gradients(found, inputs), gradients(expected, inputs)
    assert all(relative_error(have[name], want[name]) < 1e-9 for name in want)


def test_pieces_and_decoded_tokens_equal_the_whole():
    with torch.no_grad():
        inputs = tokens_of(40, 3, rows=2)
        whole, last = gated_delta_product(**inputs)
        first, state = gated_delta_product(**{name: x[:, :25] for name, x in inputs.items()})
        parts = [first]
        for t in range(25, 40):
            one = gated_delta_product_step(**{name: x[:, t] for name, x in inputs.items()}, state=state)
            parts.append(one[:, None])
        assert relative_error(torch.cat(parts, 1), whole) < 1e-12 and relative_error(state, last) < 1e-12


def test_the_layer_decodes_as_it_reads():
    torch.manual_seed(0)
    layer = GatedDeltaProduct(16, 2, 8, 4, delta_steps=3, beta_range=2).double()
    x, cache = torch.randn(2, 20, 16, dtype=torch.float64), LayerCache()
    with torch.no_grad():
        whole = layer(x)
        parts = [layer(x[:, :9], cache=cache)] + [layer(x[:, t:t + 1], cache=cache) for t in range(9, 20)]
    assert relative_error(torch.cat(parts, 1), whole) < 1e-9
    assert layer.k_proj.weight.shape == (3 * 2 * 8, 16) and layer.v_conv.weight.shape == (3 * 2 * 4, 4)


def test_what_does_not_fit_is_refused():
    inputs = tokens_of(4, 2)
    refused = (({"k": inputs["k"][:, :, 0]}, r"must be \[B, T, H, K\] and \[B, T, n, H, K\]"),
               ({"v": inputs["v"][:, :, :1]}, r"v .* must be \[B, T, n, H, V\]"),
               ({"beta": inputs["beta"][:, :, 0]}, r"beta .* must be \[1, 4, 2, 2\]"))
    for changed, message in refused:
        with pytest.raises(KernelError, match=message):
            gated_delta_product(**{**inputs, **changed})
    for arguments, message in (({"delta_steps": 0}, "delta_steps = 0"), ({"num_value_heads": 4}, "num_value_heads"),
                               ({"state_delay": 4}, "state_delay = 0")):
        with pytest.raises(KernelError, match=message):
            GatedDeltaProduct(16, 2, 8, **arguments)
