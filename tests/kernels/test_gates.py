"""Decay and write strength: backends against the definition in float64, the Triton kernels under the interpreter.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import relative_error
from interpreted import INTERPRETED
from torch import Tensor

from hola_kernels import KernelError
from hola_kernels.gates import decay_and_strength

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
SHAPES = [(1, 8), (63, 8), (3, 21, 11), (2, 2, 5, 8), (8,)]
HEADS = 4


def make(*shape: int, dtype: torch.dtype = torch.float32, heads: int = HEADS, decay: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(8)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    made = {"x": (3 * torch.randn(*shape, generator=g)).to(dtype)}
    if decay:
        made |= {name: torch.randn(heads, generator=g).to(compute) for name in ("A_log", "dt_bias")}
    return {name: value.requires_grad_() for name, value in made.items()}


def gradients(outputs: tuple[Tensor, Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of a fixed projection of both outputs: no two tokens or heads have one weight, and sums do not cancel."""
    g = torch.Generator().manual_seed(9)
    weights = [1 + torch.randn(y.shape, generator=g).to(y.dtype) for y in outputs]
    total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, list(inputs.values()))


def check(inputs: dict[str, Tensor], backend: str, heads: int = HEADS, **options: int) -> None:
    """Outputs, gradients and their dtypes against the definition in float64."""
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    expected = decay_and_strength(**exact, heads=heads, backend="reference", **options)
    found = decay_and_strength(**inputs, heads=heads, backend=backend, **options)
    compute = torch.float64 if inputs["x"].dtype == torch.float64 else torch.float32
    for y, want in zip(found, expected, strict=True):
        assert y.shape == want.shape and y.dtype == compute and relative_error(y, want) < LIMITS[compute]
    for name, have, want in zip(inputs, gradients(found, inputs), gradients(expected, exact), strict=True):
        limit = LIMITS[inputs["x"].dtype if name == "x" else compute]
        assert have.dtype == inputs[name].dtype and relative_error(have, want) < limit, name


if not INTERPRETED:
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize("decay", [True, False], ids=["decay", "none"])
    @pytest.mark.parametrize("shape", [*SHAPES, (3, 0, 8)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_outputs_and_gradients(dtype, shape, decay, backend):
        check(make(*shape, dtype=dtype, decay=decay), backend)

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_twice_the_range(backend):
        inputs = make(3, 21, 11, dtype=torch.float64)
        check(inputs, backend, beta_range=2)
        _, beta = decay_and_strength(**inputs, heads=HEADS, beta_range=2, backend=backend)
        torch.testing.assert_close(beta, 2 * inputs["x"][..., :HEADS].sigmoid(), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_torch_has_the_bits_of_the_formula(dtype):
        """Runs that began before there was a kernel go on with the same numbers."""
        inputs = make(33, 8, dtype=dtype)
        b, a = inputs["x"].split(HEADS, -1)
        expected = (-inputs["A_log"].exp() * F.softplus(a.float() + inputs["dt_bias"]), b.float().sigmoid())
        found = decay_and_strength(**inputs, heads=HEADS, backend="torch")
        both = [(*y, *gradients(y, inputs)) for y in (found, expected)]
        assert all(torch.equal(have, want) for have, want in zip(*both, strict=True))

    def test_wrong_arguments_are_named():
        inputs = make(3, 8)
        with pytest.raises(KernelError, match="A_log and dt_bias belong together"):
            decay_and_strength(**{**inputs, "dt_bias": None}, heads=HEADS)
        with pytest.raises(KernelError, match=r"dt_bias \(3,\) must be \[H\] = \(4,\)"):
            decay_and_strength(**{**inputs, "dt_bias": torch.zeros(3)}, heads=HEADS)
        with pytest.raises(KernelError, match=r"x \(3, 7\) .* W of at least 8 for 4 heads"):
            decay_and_strength(**{**inputs, "x": torch.zeros(3, 7)}, heads=HEADS)
        with pytest.raises(KernelError, match="beta_range: 3 is not one of 1, 2"):
            decay_and_strength(**inputs, heads=HEADS, beta_range=3)
else:
    from hola_kernels.gates import triton_tokens
    from hola_kernels.gates.verify_cases import limit, measure

    @pytest.mark.parametrize("decay", [True, False], ids=["decay", "none"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_triton(dtype, shape, decay):
        check(make(*shape, dtype=dtype, decay=decay), "triton")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_twice_the_range(dtype):
        check(make(3, 21, 11, dtype=dtype), "triton", beta_range=2)
        check(make(3, 21, 11, dtype=dtype, decay=False), "triton", beta_range=2)

    @pytest.mark.parametrize("tokens", [1, 63, 210])
    @pytest.mark.parametrize("heads", [1, 3, 4, 16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_everything_is_written_and_nothing_else(monkeypatch, dtype, heads, tokens):
        """Inside a transposed projection, with fewer programs than tiles: each adds up several.

        Twice the limit of a GPU: the interpreter truncates bfloat16 instead of rounding.
        """
        monkeypatch.setattr(triton_tokens, "PROGRAMS", 2)  # 420 tokens are four tiles of 128, or seven of 64
        for decay in (True, False):
            for output, error in measure(dtype=dtype, heads=heads, tokens=tokens, decay=decay, device="cpu").items():
                assert error < 2 * limit(str(dtype).removeprefix("torch."), output), (output, decay)

    @pytest.mark.parametrize("programs", [1, 2, 528])
    def test_every_token_and_head_counts_once_in_the_sums(monkeypatch, programs):
        """A token's gradient alone, a power of two for each head, is that of A_log and dt_bias, wherever it lies."""
        monkeypatch.setattr(triton_tokens, "PROGRAMS", programs)
        monkeypatch.setattr(triton_tokens, "MOST_TOKENS", 8)
        inputs, last = make(27, 8), 26
        log_decay, _ = decay_and_strength(**inputs, heads=HEADS, backend="triton")
        for token in (0, 7, 8, 15, 16, 24, last):
            one = torch.zeros_like(log_decay)
            one[token] = 2.0 ** torch.arange(1, HEADS + 1)
            dx, dA_log, ddt_bias = torch.autograd.grad(log_decay, list(inputs.values()), one, retain_graph=True)
            assert torch.equal(dA_log, one[token] * log_decay[token].detach())
            assert torch.equal(ddt_bias, dx[token, HEADS:])

    def test_sums_of_many_tokens_by_head(monkeypatch):
        monkeypatch.setattr(triton_tokens, "PROGRAMS", 3)
        inputs = make(2000, 8)
        exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
        found, expected = (gradients(decay_and_strength(**given, heads=HEADS, backend=backend), given)[1:]
                           for given, backend in ((inputs, "triton"), (exact, "torch")))
        for have, want in zip(found, expected, strict=True):
            assert torch.allclose(have.double(), want, rtol=1e-6, atol=0)

    def test_extreme_numbers_keep_their_digits():
        """Each element for itself: softplus and its slope at -30 are 1e-13, and not lost beside 1."""
        x = torch.tensor([-80.0, -30, -20, -10, -3, -1, -0.1, 0, 0.1, 1, 3, 10, 15, 20, 30, 80])[:, None].repeat(1, 2)
        inputs = {"x": x.requires_grad_(), "A_log": torch.tensor([-1.0]).requires_grad_(),
                  "dt_bias": torch.zeros(1).requires_grad_()}
        exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
        results = []
        for given, backend in ((inputs, "triton"), (exact, "torch")):
            log_decay, beta = decay_and_strength(**given, heads=1, backend=backend)
            dx, = torch.autograd.grad(log_decay.sum(), given["x"])
            results.append((log_decay, beta, dx[:, 1:]))
        for have, want in zip(*results, strict=True):
            assert torch.allclose(have.double(), want, rtol=5e-6, atol=0)

    def test_no_rate_and_huge_numbers_make_no_nan():
        inputs = {"x": torch.tensor([[-1e4, -1e4], [1e4, 1e4], [0.0, 0.0]]).requires_grad_(),
                  "A_log": torch.tensor([-200.0]).requires_grad_(), "dt_bias": torch.zeros(1).requires_grad_()}
        outputs = decay_and_strength(**inputs, heads=1, backend="triton")
        assert all(y.isfinite().all() for y in (*outputs, *gradients(outputs, inputs)))

    def test_a_gradient_of_one_output_alone_and_of_one_number():
        inputs = make(6, 10)
        for pick in (lambda y: y[0].sum(), lambda y: y[1].sum(), lambda y: (y[0] * torch.arange(6.0)[:, None]).sum()):
            found, expected = (torch.autograd.grad(pick(decay_and_strength(**inputs, heads=HEADS, backend=name)),
                                                   list(inputs.values()), materialize_grads=True)
                               for name in ("triton", "torch"))
            for have, want in zip(found, expected, strict=True):
                assert relative_error(have, want) < 1e-6

    def test_what_is_saved_is_what_is_returned():
        """Two numbers a token and head that the state keeps anyway, and none of the projection's memory."""
        inputs, saved = make(4, 32, dtype=torch.bfloat16), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            outputs = decay_and_strength(**inputs, heads=HEADS, backend="triton")
        assert saved == [y.data_ptr() for y in outputs] + [inputs["A_log"].data_ptr()]

    def test_no_decay_has_no_gradient_and_float64_is_refused():
        log_decay, beta = decay_and_strength(**make(5, 4, decay=False), heads=HEADS, backend="triton")
        assert not log_decay.requires_grad and not log_decay.any() and beta.requires_grad
        with pytest.raises(KernelError, match="do not take float64"):
            decay_and_strength(**make(5, 8, dtype=torch.float64), heads=HEADS, backend="triton")
