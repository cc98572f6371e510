"""SwiGLU: backends against torch's own functions in float64, the Triton kernels under the interpreter.

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
from hola_kernels.swiglu import swiglu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
SHAPES = [(1, 2), (5, 66), (2, 3, 4, 16), (9, 600), (3, 2 * 1408)]


def check(x: Tensor, backend: str) -> None:
    """Output, gradient and their dtypes against the same in float64, by torch."""
    wide = x.detach().double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    expected = F.silu(gate) * up
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)
    want, = torch.autograd.grad(expected, wide, dy.double())
    y = swiglu(x=x, backend=backend)
    found, = torch.autograd.grad(y, x, dy)
    assert y.shape == expected.shape and y.dtype == found.dtype == x.dtype
    assert relative_error(y, expected) < LIMITS[x.dtype] and relative_error(found, want) < LIMITS[x.dtype]


def make(*shape: int, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(4))).to(dtype).requires_grad_()


if not INTERPRETED:
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize("shape", [*SHAPES, (4, 0, 8)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_output_and_gradient(shape, dtype, backend):
        check(make(*shape, dtype=dtype), backend)

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_large_gates_do_not_overflow(backend):
        x = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 2.0, 2.0, 2.0, 2.0]])
        assert swiglu(x=x, backend=backend).tolist() == [[0.0, 0.0, 200.0, 2e4]]

    def test_wrong_arguments_are_named():
        with pytest.raises(KernelError, match=r"x \(3, 5\) of torch.float32 must be .* gate and up"):
            swiglu(x=torch.ones(3, 5))
        with pytest.raises(KernelError, match="must be floating-point"):
            swiglu(x=torch.ones(3, 4, dtype=torch.int64))
        with pytest.raises(KernelError, match="backend: 'fast'"):
            swiglu(x=torch.ones(3, 4), backend="fast")

    def test_under_the_interpreter(interpreted):
        interpreted(__file__)
else:
    from hola_kernels.swiglu import triton_rows
    from hola_kernels.swiglu.verify_cases import limit, measure

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_triton(shape, dtype):
        check(make(*shape, dtype=dtype), "triton")

    @pytest.mark.parametrize("width", [1000, 4096])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_everything_is_written(dtype, width):
        for output, error in measure(dtype=dtype, rows=5, width=width, device="cpu").items():
            assert error < limit(str(dtype).removeprefix("torch."), output)

    def test_rows_that_do_not_follow_each_other_and_a_gradient_that_is_one_number():
        wide = torch.randn(6, 100)
        x = wide[:, 4:84].requires_grad_()
        for total in (lambda y: y.sum(), lambda y: (y * torch.arange(6.0)[:, None]).sum()):
            found, expected = (torch.autograd.grad(total(swiglu(x=x, backend=name)), x)[0]
                               for name in ("triton", "torch"))
            assert relative_error(found, expected) < 1e-6

    def test_large_gates_do_not_overflow_and_float64_is_refused():
        x = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 2.0, 2.0, 2.0, 2.0]], requires_grad=True)
        y = swiglu(x=x, backend="triton")
        dx, = torch.autograd.grad(y.sum(), x)
        assert y.tolist() == [[0.0, 0.0, 200.0, 2e4]] and dx.tolist() == [[0.0, 0.0, 2.0, 2.0, 0.0, 0.0, 100.0, 1e4]]
        with pytest.raises(KernelError, match="does not take float64"):
            swiglu(x=x.double(), backend="triton")

    def test_only_the_input_is_saved():
        x, kept = make(4, 32, dtype=torch.bfloat16), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            swiglu(x=x, backend="triton")
        assert kept == [x.data_ptr()]

    @pytest.mark.parametrize(("width", "columns"), [(2816, 256), (4096, 1024), (1536, 512), (64, 256)])
    def test_tiles_waste_few_columns(width, columns):
        (programs,), tile = triton_rows._launch(65536, width)
        assert tile["WIDTH"] == columns
        assert programs * tile["ROWS"] * columns == 65536 * (width + -width % columns)
