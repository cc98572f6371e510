"""RMS norm and the residual beside it: backends against the definition in float64, Triton's under the interpreter.

It must be chosen before triton is imported, so one test starts this same file again in a process of its own.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from inputs import relative_error
from torch import Tensor

from hola_kernels import KernelError
from hola_kernels.rms_norm import rms_norm, rms_norm_with_residual

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton's interpreter cuts bfloat16's digits off instead of rounding them
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}
SHAPES = [(70,), (9, 5), (3, 80), (2, 3, 4, 33), (19, 200)]
EPS = 1e-3  # large, so that leaving it out shows


def make(*shape: int, dtype: torch.dtype = torch.float32, weight: torch.dtype | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    made = {"x": (torch.randn(*shape, generator=g) + 0.5).to(dtype),
            "weight": (1 + torch.randn(shape[-1], generator=g) / 2).to(weight or dtype)}
    return {name: value.requires_grad_() for name, value in made.items()}


def run(inputs: dict[str, Tensor], backend: str, incoming: list[Tensor | None]) -> tuple[Tensor, ...]:
    """Outputs, and gradients of the inputs by those of the outputs; None where an output is not used."""
    outputs = rms_norm_with_residual(**inputs, eps=EPS, backend=backend)
    used = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, incoming, strict=True) if dy is not None]
    found = torch.autograd.grad([y for y, _ in used], list(inputs.values()), [dy for _, dy in used], allow_unused=True)
    return *outputs, *found


def check(inputs: dict[str, Tensor], backend: str, used: str = "y residual") -> None:
    """Outputs, gradients and their dtypes against the definition in float64."""
    wide, x = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}, inputs["x"]
    g = torch.Generator().manual_seed(5)
    incoming = [(1 + torch.randn(x.shape, generator=g)).to(x.dtype) if name in used.split() else None
                for name in ("y", "residual")]
    y, residual, *have = run(inputs, backend, incoming)
    expected, _, *want = run(wide, "reference", incoming)
    assert y.shape == x.shape and y.dtype == x.dtype and relative_error(y, expected) < LIMITS[x.dtype]
    assert torch.equal(residual, x) and residual.data_ptr() == x.data_ptr()
    for (name, value), found, exact in zip(inputs.items(), have, want, strict=True):
        assert (found is None) == (exact is None)
        if found is not None:
            assert found.dtype == value.dtype and relative_error(found, exact) < LIMITS[value.dtype], name


if not INTERPRETED:
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize("shape", [*SHAPES, (3, 0, 8)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_outputs_and_gradients(dtype, shape, backend):
        check(make(*shape, dtype=dtype), backend)

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_weight_of_another_dtype(backend):
        check(make(7, 33, dtype=torch.bfloat16, weight=torch.float32), backend)
        check(make(7, 33, dtype=torch.float32, weight=torch.bfloat16), backend)

    def test_gradients_by_differences():
        inputs = make(3, 5, dtype=torch.float64)
        for backend in ("reference", "torch"):
            assert torch.autograd.gradcheck(lambda x, weight, name=backend: rms_norm_with_residual(
                x=x, weight=weight, eps=EPS, backend=name), tuple(inputs.values()))

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_formula(backend):
        x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
        weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
        y = rms_norm(x=x, weight=weight, eps=12.5, backend=backend)  # mean square 12.5
        assert torch.allclose(y, torch.tensor([[0.6, 1.6], [0.0, 0.0]], dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_torch_has_the_bits_of_torch(dtype):
        """Runs that began before there was a kernel go on with the same numbers."""
        inputs = make(33, 80, dtype=dtype)
        x, weight = inputs.values()
        y, residual = rms_norm_with_residual(**inputs, eps=EPS, backend="torch")
        expected = F.rms_norm(x, weight.shape, weight, EPS)
        both = [(out, *torch.autograd.grad((out * 3 + stream).square().sum(), (x, weight)))
                for out, stream in ((y, residual), (expected, x))]
        assert all(torch.equal(have, want) for have, want in zip(*both, strict=True))

    def test_wrong_arguments_are_named():
        with pytest.raises(KernelError, match=r"weight \(4,\) must be \[D\] with the D of x \(3, 5\)"):
            rms_norm(x=torch.ones(3, 5), weight=torch.ones(4))
        with pytest.raises(KernelError, match=r"x of torch.int64 .* must be floating-point"):
            rms_norm(x=torch.ones(3, 4, dtype=torch.int64), weight=torch.ones(4))
        with pytest.raises(KernelError, match="backend: 'fast'"):
            rms_norm(x=torch.ones(3, 4), weight=torch.ones(4), backend="fast")

    def test_under_the_interpreter(interpreted):
        interpreted(__file__)
else:
    from hola_kernels.rms_norm import triton_rows
    from hola_kernels.rms_norm.verify_cases import limit, measure

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_triton(dtype, shape):
        check(make(*shape, dtype=dtype), "triton")

    @pytest.mark.parametrize("used", ["y", "residual"])
    def test_one_output_alone(used):
        check(make(7, 80), "triton", used)

    def test_weight_of_another_dtype():
        check(make(7, 33, dtype=torch.bfloat16, weight=torch.float32), "triton")
        check(make(7, 33, dtype=torch.float32, weight=torch.bfloat16), "triton")

    @pytest.mark.parametrize(("dtype", "width", "rows"), [
        (torch.float32, 80, 61), (torch.float16, 80, 61), (torch.bfloat16, 80, 61), (torch.float32, 1030, 3)], ids=str)
    def test_everything_is_written_by_fewer_programs_than_tiles(monkeypatch, dtype, width, rows):
        """Each adds up several tiles. Twice a GPU's limit, for bfloat16's sake."""
        monkeypatch.setattr(triton_rows, "_programs", lambda _: 3)
        for residual in (False, True):
            found = measure(dtype=dtype, rows=rows, width=width, residual=residual, device="cpu")
            for output, error in found.items():
                assert error < 2 * limit(str(dtype).removeprefix("torch."), output), (output, residual)

    @pytest.mark.parametrize("programs", [1, 3, 528])
    def test_every_row_and_column_counts_once_in_the_weights_gradient(monkeypatch, programs):
        monkeypatch.setattr(triton_rows, "_programs", lambda _: programs)
        monkeypatch.setattr(triton_rows, "NUMBERS", 16)  # two rows of 8
        inputs = make(13, 8)
        y = rms_norm(**inputs, eps=EPS, backend="triton")
        u = y.detach() / inputs["weight"].detach()
        for row in (0, 1, 5, 6, 12):
            one = torch.zeros_like(y)
            one[row, row % 8] = 2.0
            dweight, = torch.autograd.grad(y, inputs["weight"], one, retain_graph=True)
            assert torch.allclose(dweight, torch.where(torch.arange(8) == row % 8, 2 * u[row], 0.0), rtol=1e-6, atol=0)

    def test_unevenly_spaced_rows_and_gradients():
        """Rows apart, at no single stride, columns apart; gradients of stride zero, and beside each other."""
        whole = torch.randn(4, 6, 5, 60)
        for x in (whole[0, 0, :, 4:44], whole[:, 1:3, 2], whole[1:3].transpose(0, 2), whole[..., ::2]):
            inputs = {"x": x.requires_grad_(), "weight": torch.rand(x.shape[-1]).requires_grad_()}
            factors = torch.rand(*x.shape[:-1], 2 * x.shape[-1])
            for total in (lambda y, r: y.sum() + (r * torch.arange(r.shape[-2])[:, None]).sum(),
                          lambda y, r, f=factors: (torch.cat([y, r], -1) * f).sum()):
                results = []
                for name in ("triton", "reference"):
                    y, residual = rms_norm_with_residual(**inputs, eps=EPS, backend=name)
                    assert residual.data_ptr() == x.data_ptr() and residual.stride() == x.stride()
                    results.append((y, *torch.autograd.grad(total(y, residual), list(inputs.values()))))
                for have, want in zip(*results, strict=True):
                    assert have.shape == want.shape and relative_error(have, want) < 1e-6
            x.requires_grad_(False)

    def test_in_a_chain_of_layers_leaves_get_their_gradients():
        """As layers use it: twice in a row, the stream added to what comes of its normed copy; x is a leaf."""
        leaves = [make(7, 16), make(7, 16)]
        for backend, given in zip(("triton", "reference"), leaves, strict=True):
            stream = given["x"]
            for _ in range(2):
                normed, residual = rms_norm_with_residual(x=stream, weight=given["weight"], eps=EPS, backend=backend)
                stream = residual + normed.tanh()
            stream.square().sum().backward()
        for name, value in leaves[0].items():
            assert relative_error(value.grad, leaves[1][name].grad) < 1e-6

    def test_the_gradients_that_come_in_are_not_written_to():
        inputs = make(5, 16)
        y, residual = rms_norm_with_residual(**inputs, eps=EPS, backend="triton")
        gradients = [torch.full_like(y, 0.5), torch.full_like(y, 0.25)]
        torch.autograd.grad((y, residual), inputs["x"], gradients)
        assert gradients[0].eq(0.5).all() and gradients[1].eq(0.25).all()

    @pytest.mark.parametrize("frozen", ["x", "weight"])
    def test_only_the_gradients_asked_for(frozen):
        inputs = make(5, 16)
        inputs[frozen].requires_grad_(False)
        wanted = next(value for value in inputs.values() if value.requires_grad)
        results = []
        for backend in ("triton", "reference"):
            y, residual = rms_norm_with_residual(**inputs, eps=EPS, backend=backend)
            assert residual.requires_grad is (frozen == "weight")
            results.append(torch.autograd.grad(y.square().sum() + (3 * residual).sum(), wanted)[0])
        assert relative_error(*results) < 1e-6

    def test_saved_are_x_weight_and_a_number_a_row_and_nothing_without_gradients():
        inputs, kept = make(4, 32, dtype=torch.bfloat16), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            rms_norm(**inputs, eps=EPS, backend="triton")
            with torch.no_grad():
                y, residual = rms_norm_with_residual(**inputs, eps=EPS, backend="triton")
        assert [t.data_ptr() for t in kept[:2]] == [value.data_ptr() for value in inputs.values()]
        assert len(kept) == 3 and kept[2].shape == (4,) and kept[2].dtype == torch.float32
        assert residual is inputs["x"] and not y.requires_grad
        assert torch.equal(y, rms_norm(**inputs, eps=EPS, backend="triton"))

    def test_no_rows():
        inputs = make(3, 0, 8)
        y, residual = rms_norm_with_residual(**inputs, backend="triton")
        dx, dweight = torch.autograd.grad((y + residual).sum(), list(inputs.values()))
        assert dx.shape == y.shape == (3, 0, 8) and dweight.eq(0).all()

    def test_float64_and_very_wide_rows_are_refused():
        with pytest.raises(KernelError, match="does not take float64"):
            rms_norm(**make(3, 8, dtype=torch.float64), backend="triton")
        with pytest.raises(KernelError, match="at most 16384 columns, not 16385"):
            rms_norm(**make(1, 16385), backend="triton")

    @pytest.mark.parametrize(("width", "tile", "programs"), [
        (80, (16, 128, 4), 528), (1024, (2, 1024, 4), 528), (2048, (1, 2048, 4), 528), (5120, (1, 8192, 16), 132),
        (16384, (1, 16384, 32), 132)])
    def test_tiles(width, tile, programs):
        made = triton_rows._tile(width)
        assert tuple(made.values()) == tile and triton_rows._programs(made["num_warps"]) == programs
