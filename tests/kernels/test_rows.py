"""Operations on rows (RMS norm, gated RMS norm, SwiGLU) against their formulas in float64, in every backend.

The Triton kernels are interpreted: TRITON_INTERPRET=1 pytest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from inputs import relative_error
from interpreted import INTERPRETED
from torch import Tensor

from hola_kernels import KernelError, gated_rms_norm
from hola_kernels.rms_norm import rms_norm, rms_norm_with_residual
from hola_kernels.swiglu import swiglu

BACKENDS = ["triton"] if INTERPRETED else ["reference", "torch"]
DTYPES = [torch.float32, torch.bfloat16, *([] if INTERPRETED else [torch.float64])]
# Triton's interpreter truncates bfloat16 instead of rounding
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}
SHAPES = [(70,), (9, 6), (3, 80), (2, 3, 4, 34), (19, 200), (3, 2 * 1408)]
EPS = 1e-3  # large, so that leaving it out shows


@dataclass(frozen=True)
class Operation:
    """run(backend, **inputs) and formula(**inputs) give all outputs; inputs: their names."""

    inputs: tuple[str, ...]
    run: Callable[..., tuple[Tensor, ...]]
    formula: Callable[..., tuple[Tensor, ...]]


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


OPERATIONS = {
    "rms_norm": Operation(("x", "weight"), lambda backend, **x: (rms_norm(**x, eps=EPS, backend=backend),),
                          lambda x, weight: (normed(x, weight),)),
    "rms_norm_with_residual": Operation(
        ("x", "weight"), lambda backend, **x: rms_norm_with_residual(**x, eps=EPS, backend=backend),
        lambda x, weight: (normed(x, weight), x)),
    "gated_rms_norm": Operation(
        ("x", "gate", "weight"), lambda backend, **x: (gated_rms_norm(**x, eps=EPS, backend=backend),),
        lambda x, gate, weight: (normed(x, weight) * F.silu(gate),)),
    "swiglu": Operation(("x",), lambda backend, x: (swiglu(x=x, backend=backend),),
                        lambda x: (F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],)),
}
WEIGHTED = [name for name, operation in OPERATIONS.items() if "weight" in operation.inputs]


def make(name: str, *shape: int, dtype: torch.dtype = torch.float32,
         weight: torch.dtype | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    made = {"x": (torch.randn(*shape, generator=g) + 0.5).to(dtype),
            "gate": (2 * torch.randn(*shape, generator=g)).to(dtype),
            "weight": (1 + torch.randn(shape[-1], generator=g) / 2).to(weight or dtype)}
    return {n: made[n].requires_grad_() for n in OPERATIONS[name].inputs}


def outputs_and_gradients(run: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor],
                          incoming: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = run(**inputs)
    return *outputs, *torch.autograd.grad(outputs, list(inputs.values()),
                                          [dy.to(y.dtype) for y, dy in zip(outputs, incoming, strict=True)])


def check(name: str, inputs: dict[str, Tensor], backend: str) -> None:
    """Outputs, gradients, their shapes and dtypes."""
    operation, x = OPERATIONS[name], inputs["x"]
    exact = {n: value.detach().double().requires_grad_() for n, value in inputs.items()}
    g = torch.Generator().manual_seed(5)
    incoming = [(1 + torch.randn(y.shape, generator=g)).to(x.dtype) for y in operation.formula(**exact)]
    found = outputs_and_gradients(lambda **given: operation.run(backend, **given), inputs, incoming)
    expected = outputs_and_gradients(operation.formula, exact, incoming)
    dtypes = [x.dtype] * len(incoming) + [value.dtype for value in inputs.values()]
    for have, want, dtype in zip(found, expected, dtypes, strict=True):
        assert have.shape == want.shape and have.dtype == dtype and relative_error(have, want) < LIMITS[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 0, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_outputs_and_gradients(name, dtype, shape, backend):
    check(name, make(name, *shape, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WEIGHTED)
def test_weight_of_another_dtype(name, backend):
    check(name, make(name, 7, 34, dtype=torch.bfloat16, weight=torch.float32), backend)
    check(name, make(name, 7, 34, dtype=torch.float32, weight=torch.bfloat16), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_unevenly_spaced_rows_and_gradients(name, backend):
    """Rows apart, at no single stride, columns apart; gradients of stride zero, and beside each other."""
    whole, operation = torch.randn(4, 6, 5, 60, generator=torch.Generator().manual_seed(6)), OPERATIONS[name]
    for x in (whole[0, 0, :, 4:44], whole[:, 1:3, 2], whole[1:3].transpose(0, 2), whole[..., ::2]):
        inputs = {**make(name, *x.shape), "x": x.requires_grad_()}
        factors = [torch.rand(y.shape) for y in operation.formula(**inputs)]
        for total in (lambda outputs: sum((y * torch.arange(y.shape[-2])[:, None]).sum() for y in outputs),
                      lambda outputs, f=factors: (torch.cat(outputs, -1) * torch.cat(f, -1)).sum()):
            found, expected = ((y, *torch.autograd.grad(total(y), list(inputs.values())))
                               for y in (operation.run(backend, **inputs), operation.formula(**inputs)))
            for have, want in zip((*found[0], *found[1:]), (*expected[0], *expected[1:]), strict=True):
                assert have.shape == want.shape and relative_error(have, want) < 1e-6
        x.requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_formulas(backend):
    """Numbers by hand; gates so large that their exponential overflows."""
    x, weight, gate = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, 2.0]), torch.tensor([[50.0, 0.0]] * 2)
    half = {"x": x, "weight": weight, "eps": 12.5, "backend": backend}  # the mean square of the first row
    torch.testing.assert_close(rms_norm(**half), torch.tensor([[0.6, 1.6], [0.0, 0.0]]))
    torch.testing.assert_close(gated_rms_norm(**half, gate=gate), torch.tensor([[30.0, 0.0], [0.0, 0.0]]))
    x = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 2.0, 2.0, 2.0, 2.0]], requires_grad=True)
    y = swiglu(x=x, backend=backend)
    dx, = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [[0.0, 0.0, 200.0, 2e4]]
    assert backend == "reference" or dx.tolist() == [[0.0, 0.0, 2.0, 2.0, 0.0, 0.0, 100.0, 1e4]]


if not INTERPRETED:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_gradients_by_differences(name, backend):
        inputs = make(name, 3, 6, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda *given: OPERATIONS[name].run(
            backend, **dict(zip(inputs, given, strict=True))), tuple(inputs.values()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_torch_backend_of_rms_norm_has_the_bits_of_torch(dtype):
        """Runs that began before there was a kernel go on with the same numbers."""
        inputs = make("rms_norm", 33, 80, dtype=dtype)
        both = [(y, *torch.autograd.grad((y * 3 + stream).square().sum(), list(inputs.values())))
                for y, stream in (rms_norm_with_residual(**inputs, eps=EPS, backend="torch"),
                                  OPERATIONS["rms_norm_with_residual"].formula(**inputs))]
        assert all(torch.equal(have, want) for have, want in zip(*both, strict=True))

    @pytest.mark.parametrize(("run", "arguments", "message"), [
        (rms_norm, {"weight": torch.ones(4)}, r"weight \(4,\) must be \[D\] with the D of x \(3, 6\)"),
        (gated_rms_norm, {"gate": torch.ones(2, 6), "weight": torch.ones(6)},
         r"x \(3, 6\) and gate \(2, 6\) must have the same shape"),
        (gated_rms_norm, {"gate": torch.ones(3, 6), "weight": torch.ones(4)}, r"weight \(4,\) must be \[V\]"),
        (swiglu, {"x": torch.ones(3, 5)}, r"x \(3, 5\) of torch.float32 must be .* gate and up"),
        *((run, {"x": torch.ones(3, 6, dtype=torch.int64), **more}, "x of torch.int64 must be floating-point")
          for run, more in ((rms_norm, {"weight": torch.ones(6)}), (swiglu, {}))),
        *((run, {"backend": "fast", **more}, "backend: 'fast' is not one of")
          for run, more in ((rms_norm, {"weight": torch.ones(6)}), (swiglu, {})))])
    def test_wrong_arguments_are_named(run, arguments, message):
        with pytest.raises(KernelError, match=message):
            run(**{"x": torch.ones(3, 6), **arguments})
else:
    from hola_kernels.gated_norm import triton_rows as gated_rows
    from hola_kernels.gated_norm import verify_cases as gated_cases
    from hola_kernels.rms_norm import triton_rows as norm_rows
    from hola_kernels.rms_norm import verify_cases as norm_cases
    from hola_kernels.swiglu import triton_rows as swiglu_rows
    from hola_kernels.swiglu import verify_cases as swiglu_cases

    def programs(monkeypatch, count):
        """Of the backward passes that add up several tiles."""
        monkeypatch.setattr(norm_rows, "_programs", lambda _: count)
        monkeypatch.setattr(gated_rows, "PROGRAMS", count)

    @pytest.mark.parametrize(("cases", "dtype", "rows", "options"), [
        *((norm_cases, dtype, rows, {"width": width, "residual": residual}) for residual in (False, True)
          for dtype, width, rows in ((torch.float32, 80, 61), (torch.float16, 80, 61), (torch.bfloat16, 80, 61),
                                     (torch.float32, 1030, 3))),
        *((gated_cases, dtype, 61, {"width": 80}) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *((swiglu_cases, dtype, 5, {"width": width}) for dtype in (torch.float32, torch.float16)
          for width in (1000, 4096))])
    def test_everything_is_written_by_fewer_programs_than_tiles(monkeypatch, cases, dtype, rows, options):
        """Twice a GPU's limit, for bfloat16's sake."""
        programs(monkeypatch, 3)
        for output, error in cases.measure(dtype=dtype, rows=rows, device="cpu", **options).items():
            assert error < 2 * cases.limit(str(dtype).removeprefix("torch."), output), output

    @pytest.mark.parametrize("count", [1, 3, 528])
    @pytest.mark.parametrize("name", WEIGHTED)
    def test_every_row_and_column_counts_once_in_the_weights_gradient(monkeypatch, name, count):
        programs(monkeypatch, count)
        monkeypatch.setattr(norm_rows, "NUMBERS", 16)  # two rows of 8
        monkeypatch.setattr(gated_rows, "row_tile", lambda width, _: {"ROWS": 2, "WIDTH": width})
        inputs = make(name, 13, 8)
        y = OPERATIONS[name].run("triton", **inputs)[0]
        u = y.detach() / inputs["weight"].detach()
        for row in (0, 1, 5, 6, 12):
            one = torch.zeros_like(y)
            one[row, row % 8] = 2.0
            dweight, = torch.autograd.grad(y, inputs["weight"], one, retain_graph=True)
            assert torch.allclose(dweight, torch.where(torch.arange(8) == row % 8, 2 * u[row], 0.0), rtol=2e-6, atol=0)

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_the_gradients_that_come_in_are_not_written_to(name):
        inputs = make(name, 5, 16)
        outputs = OPERATIONS[name].run("triton", **inputs)
        gradients = [torch.full_like(y, 0.5) for y in outputs]
        torch.autograd.grad(outputs, list(inputs.values()), gradients)
        assert all(dy.eq(0.5).all() for dy in gradients)

    @pytest.mark.parametrize(("name", "frozen"), [(name, frozen) for name in WEIGHTED
                                                  for frozen in OPERATIONS[name].inputs])
    def test_only_the_gradients_asked_for(name, frozen):
        inputs = make(name, 5, 16)
        inputs[frozen].requires_grad_(False)
        wanted = [value for value in inputs.values() if value.requires_grad]
        found, expected = (torch.autograd.grad(sum((3 * y).square().sum() for y in outputs), wanted) for outputs in (
            OPERATIONS[name].run("triton", **inputs), OPERATIONS[name].formula(**inputs)))
        assert all(relative_error(have, want) < 1e-6 for have, want in zip(found, expected, strict=True))

    @pytest.mark.parametrize(("name", "more"), [("rms_norm", [(4,)]), ("gated_rms_norm", []), ("swiglu", [])])
    def test_saved_are_the_inputs_and_nothing_without_gradients(name, more):
        """And of the RMS norm one number a row."""
        inputs, saved = make(name, 4, 32, dtype=torch.bfloat16), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y, = OPERATIONS[name].run("triton", **inputs)
            with torch.no_grad():
                alone, = OPERATIONS[name].run("triton", **inputs)
        assert [t.data_ptr() for t in saved[: len(inputs)]] == [value.data_ptr() for value in inputs.values()]
        assert [tuple(t.shape) for t in saved[len(inputs):]] == more
        assert torch.equal(alone, y) and not alone.requires_grad

    @pytest.mark.parametrize(("name", "most"), [("rms_norm", 16384), ("gated_rms_norm", 4096), ("swiglu", None)])
    def test_float64_and_too_many_columns_are_refused(name, most):
        with pytest.raises(KernelError, match="does not take float64"):
            OPERATIONS[name].run("triton", **make(name, 3, 8, dtype=torch.float64))
        if most:
            with pytest.raises(KernelError, match=f"at most {most} columns, not {most + 1}"):
                OPERATIONS[name].run("triton", **make(name, 1, most + 1))

    @pytest.mark.parametrize("used", [0, 1])
    def test_one_output_of_the_norm_with_residual(used):
        inputs = make("rms_norm_with_residual", 7, 80)
        found, expected = (torch.autograd.grad(outputs[used].square().sum(), list(inputs.values()), allow_unused=True)
                           for outputs in (OPERATIONS["rms_norm_with_residual"].run("triton", **inputs),
                                           OPERATIONS["rms_norm_with_residual"].formula(**inputs)))
        assert [have is None for have in found] == [want is None for want in expected]
        assert all(relative_error(have, want) < 1e-6 for have, want in zip(found, expected, strict=True)
                   if have is not None)

    def test_the_residual_is_x_itself():
        inputs = make("rms_norm_with_residual", 5, 16)
        with torch.no_grad():
            assert rms_norm_with_residual(**inputs, backend="triton")[1] is inputs["x"]
        residual = rms_norm_with_residual(**inputs, backend="triton")[1]
        assert residual.data_ptr() == inputs["x"].data_ptr() and residual.requires_grad
        inputs["x"].requires_grad_(False)
        assert not rms_norm_with_residual(**inputs, backend="triton")[1].requires_grad

    def test_in_a_chain_of_layers_leaves_get_their_gradients():
        """As layers use it: twice in a row, the stream added to what comes of its normed copy; x is a leaf."""
        leaves = [make("rms_norm", 7, 16), make("rms_norm", 7, 16)]
        for backend, given in zip(("triton", "reference"), leaves, strict=True):
            stream = given["x"]
            for _ in range(2):
                y, residual = rms_norm_with_residual(x=stream, weight=given["weight"], eps=EPS, backend=backend)
                stream = residual + y.tanh()
            stream.square().sum().backward()
        for name, value in leaves[0].items():
            assert relative_error(value.grad, leaves[1][name].grad) < 1e-6

    @pytest.mark.parametrize(("width", "tile", "count"), [
        (80, (16, 128, 4), 528), (1024, (2, 1024, 4), 528), (2048, (1, 2048, 4), 528), (5120, (1, 8192, 16), 132),
        (16384, (1, 16384, 32), 132)])
    def test_tiles_of_rms_norm(width, tile, count):
        made = norm_rows._tile(width)
        assert tuple(made.values()) == tile and norm_rows._programs(made["num_warps"]) == count

    @pytest.mark.parametrize(("width", "columns"), [(2816, 256), (4096, 1024), (1536, 512), (64, 256)])
    def test_tiles_of_swiglu_waste_few_columns(width, columns):
        (count,), tile = swiglu_rows._launch(65536, width)
        assert tile["WIDTH"] == columns
        assert count * tile["ROWS"] * columns == 65536 * (width + -width % columns)
