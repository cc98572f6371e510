"""Correctness cases of the RMS norm on the current GPU, against the torch backend in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hola_kernels.rms_norm import rms_norm_with_residual
from hola_kernels.verify import against_float64, relative_error

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}
EPS = 1e-6
END = 999  # rows of the large case that lie beyond what 32 bits count


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    made = [(f"{str(dtype).removeprefix('torch.')} rms_norm D={width}{' with residual' if residual else ''}",
             lambda d=dtype, w=width, r=residual: measure(dtype=d, rows=2003, width=w, residual=r))
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for width in (80, 768, 1024, 2048, 4096, 5120, 16384) for residual in (False, True)]
    return [*made, ("bfloat16 rms_norm D=1024 with residual, float32 weight", lambda: measure(
                dtype=torch.bfloat16, rows=2003, width=1024, residual=True, weight_dtype=torch.float32)),
            ("bfloat16 rms_norm D=1024 with residual, large", lambda: measure_end(width=1024))]


def limit(name: str, output: str) -> float:
    """The largest error of any output that the case `name` may show."""
    return LIMITS["float32" if output == "d weight" and "float32 weight" in name else name.split()[0]]


def measure(*, dtype: torch.dtype, rows: int, width: int, residual: bool, weight_dtype: torch.dtype | None = None,
            device: str = "cuda") -> dict[str, float]:
    """Errors of output and gradients; some rows are so small that eps counts, some a thousand times larger.

    All of mean one: sums of noise alone would be small beside their terms, and show nothing but rounding.
    """
    x = 1 + torch.randn(3, rows, width, device=device)
    x[:, ::7] *= 1e-3
    x[:, 1::7] *= 1e3
    weight = (1 + torch.randn(width, device=device) / 2).to(weight_dtype or dtype)
    gradients = [(1 + torch.randn(3, rows, width, device=device)).to(dtype) for _ in range(1 + residual)]
    found, expected = against_float64(
        lambda backend, **given: rms_norm_with_residual(**given, eps=EPS, backend=backend),
        {"x": x.to(dtype), "weight": weight}, gradients)
    (y, _, *have), (expected_y, _, *want) = found, expected
    return {"y": row_error(y, expected_y), "d x": row_error(have[0], want[0]),
            "d weight": relative_error(have[1], want[1])}


def row_error(found: Tensor, expected: Tensor) -> float:
    """`relative_error` with every row weighted equally, however large its numbers."""
    scale = expected.detach().double().norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return relative_error(found / scale, expected / scale)


def _run(inputs: list[Tensor], gradients: list[Tensor], backend: str) -> tuple[Tensor, ...]:
    """y and the gradients of x and weight; `gradients`: of y, and of the residual if there are two."""
    outputs = rms_norm_with_residual(x=inputs[0], weight=inputs[1], eps=EPS, backend=backend)
    return (outputs[0], *torch.autograd.grad(outputs[:len(gradients)], inputs, gradients))


def measure_end(*, width: int) -> dict[str, float]:
    """Errors of the last rows of an input of more than 2^31 numbers."""
    rows = 2**31 // width + END
    x, dy, dresidual = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    y, dx, _ = _run([x.requires_grad_(), weight.requires_grad_()], [dy, dresidual], "triton")
    end = [x.detach()[-END:].double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected, want, _ = _run(end, [dy[-END:].double(), dresidual[-END:].double()], "torch")
    return {"y": row_error(y[-END:], expected), "d x": row_error(dx[-END:], want)}
