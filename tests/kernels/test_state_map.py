"""The affine map of a piece of a sequence, and the gradient entering it, against the rule they describe."""

from __future__ import annotations

import pytest
import torch
from inputs import make_inputs, relative_error
from interpreted import INTERPRETED
from torch import Tensor

from hola_kernels import entering_gradient, gated_delta_rule, state_map
from hola_kernels.gated_delta.affine_maps import compose


def measure(inputs: dict[str, Tensor], backend: str, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    """Errors of the last state M S + E and of the entering gradient, for a random state and output gradient."""
    exact = {n: inputs[n].detach().double() for n in ("q", "k", "v", "log_decay", "beta")}
    rounded = {n: x.to(dtype) for n, x in exact.items()}
    (rows, _, heads, key), value = exact["k"].shape, exact["v"].shape[-1]
    generator = torch.Generator().manual_seed(2)
    state = torch.randn(rows, heads, key, value, generator=generator, dtype=torch.float64).requires_grad_()
    do = torch.randn(exact["v"].shape, generator=generator, dtype=torch.float64)
    o, _, last = gated_delta_rule(**exact, initial_state=state, backend="torch" if INTERPRETED else "reference")
    (wanted,) = torch.autograd.grad((o * do).sum(), state)
    matrix, addition = state_map(**{n: rounded[n] for n in ("k", "v", "log_decay", "beta")}, backend=backend)
    found = entering_gradient(**{n: rounded[n] for n in ("q", "k", "log_decay", "beta")}, do=do.to(dtype),
                              backend=backend)
    return relative_error(matrix.double() @ state + addition.double(), last), relative_error(found, wanted)


if not INTERPRETED:
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize(("length", "decay"), [(1, "slow"), (63, "fast"), (64, "none"), (200, "slow")])
    def test_float64_matches_the_rule(backend, length, decay):
        last, entering = measure(make_inputs(2 if length < 100 else 1, length, value=12, decay=decay), backend)
        assert last < 1e-9 and entering < 1e-9

    def test_float32_is_within_the_contract():
        last, entering = measure(make_inputs(1, 257, key=32, value=32), "torch", torch.float32)
        assert last < 1e-5 and entering < 1e-4

    def test_maps_compose():
        tokens = {n: x.detach() for n, x in make_inputs(2, 130).items() if n in ("k", "v", "log_decay", "beta")}
        pieces = [state_map(**{n: x[:, a:b] for n, x in tokens.items()}) for a, b in ((0, 7), (7, 80), (80, 130))]
        both = compose(torch.stack([torch.cat([addition, matrix], -1) for matrix, addition in pieces], 1))
        matrix, addition = state_map(**tokens)
        assert relative_error(both, torch.cat([addition, matrix], -1)) < 1e-12

    def test_no_tokens_change_nothing():
        tokens = {n: x[:, :0].detach() for n, x in make_inputs(1, 1).items() if x.ndim > 2}
        for backend in ("reference", "torch"):
            matrix, addition = state_map(**{n: tokens[n] for n in ("k", "v", "log_decay", "beta")}, backend=backend)
            assert torch.equal(matrix[0, 0], torch.eye(16).double()) and not addition.any()
            found = entering_gradient(**{n: tokens[n] for n in ("q", "k", "log_decay", "beta")}, do=tokens["v"],
                                      backend=backend)
            assert not found.any() and found.shape == addition.shape
else:
    from hola_kernels.gated_delta import triton_rule

    @pytest.mark.parametrize("chunks_a_span", [None, 1])
    def test_triton_matches_the_rule(chunks_a_span, monkeypatch):
        """Whole pieces, and pieces split into spans of one chunk."""
        if chunks_a_span:
            monkeypatch.setattr(triton_rule, "span_chunks", lambda *_: chunks_a_span)
        last, entering = measure(make_inputs(2, 70, heads=1, key=64, value=64), "triton", torch.float32)
        assert last < 1e-5 and entering < 1e-4
