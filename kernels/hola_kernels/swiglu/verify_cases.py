"""Correctness cases of SwiGLU on the current GPU, against the torch backend in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hola_kernels.swiglu import swiglu
from hola_kernels.verify import against_float64, relative_error

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}
END = 999  # rows of the large case that lie beyond what 32 bits count


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    made = [(f"{str(dtype).removeprefix('torch.')} swiglu F={width}",
             lambda d=dtype, f=width: measure(dtype=d, rows=2003, width=f))
            for dtype in (torch.bfloat16, torch.float16, torch.float32) for width in (33, 176, 1000, 1408, 2816, 4096)]
    return [*made, ("bfloat16 swiglu F=1408 large", lambda: measure_end(width=1408))]


def limit(name: str, output: str) -> float:
    """The largest error of any output that the case `name` may show."""
    return LIMITS[name.split()[0]]


def measure(*, dtype: torch.dtype, rows: int, width: int, device: str = "cuda") -> dict[str, float]:
    """Errors of output and gradient; gates as large as 40, where the sigmoid is 0 or 1."""
    x = 3 * torch.randn(3, rows, 2 * width, device=device)
    x[:, ::7] *= 4
    dy = torch.randn(3, rows, width, device=device).to(dtype)
    (y, dx), (expected, want) = against_float64(lambda backend, x: (swiglu(x=x, backend=backend),), {"x": x.to(dtype)},
                                                [dy])
    return {"y": relative_error(y, expected), "d gate": relative_error(dx[..., :width], want[..., :width]),
            "d up": relative_error(dx[..., width:], want[..., width:])}


def measure_end(*, width: int) -> dict[str, float]:
    """Errors of the last rows of an input of more than 2^31 numbers."""
    rows = 2**31 // (2 * width) + END
    x = torch.randn(rows, 2 * width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    y = swiglu(x=x, backend="triton")
    dx, = torch.autograd.grad(y, x, dy)
    end = x.detach()[-END:].double().requires_grad_()
    expected = swiglu(x=end, backend="torch")
    want, = torch.autograd.grad(expected, end, dy[-END:].double())
    return {"y": relative_error(y[-END:], expected), "d x": relative_error(dx[-END:], want)}
