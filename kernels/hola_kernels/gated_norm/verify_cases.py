"""Correctness cases of the gated norm on the current GPU, against the torch backend in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hola_kernels.gated_norm import gated_rms_norm
from hola_kernels.verify import against_float64, relative_error

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    made = [(f"{str(dtype).removeprefix('torch.')} gated norm V={width}",
             lambda d=dtype, v=width: measure(dtype=d, width=v))
            for dtype in (torch.bfloat16, torch.float16, torch.float32) for width in (64, 96, 128, 256)]
    return [*made, ("bfloat16 gated norm of heads that lie far apart", measure_far)]


def limit(name: str, output: str) -> float:
    """The largest error of any output that the case `name` may show."""
    return LIMITS[name.split()[0]]


def measure_far() -> dict[str, float]:
    """Errors where heads lie outermost, more numbers apart than 32 bits count from the first to the last (6.4 GB)."""
    stride = 2**30 + 64
    whole = torch.zeros(3 * stride, dtype=torch.bfloat16, device="cuda")
    x = whole.as_strided((100, 3, 64), (64, stride, 1))
    x.copy_(torch.randn(100, 3, 64))
    weight = torch.ones(64, device="cuda")
    found = [y.requires_grad_() for y in (x, x.contiguous())]
    ys = [gated_rms_norm(x=y, gate=y, weight=weight, backend="triton") for y in found]
    gradients = [torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in zip(ys, found, strict=True)]
    return {"y": relative_error(*ys), "d x": relative_error(*gradients)}


def measure(*, dtype: torch.dtype, width: int, rows: int = 9001, device: str = "cuda") -> dict[str, float]:
    """Errors of the output and all gradients of more rows than the backward pass has programs."""
    shapes = {"x": (3, rows, width), "gate": (3, rows, width), "weight": (width,)}
    inputs = {n: torch.randn(*shape, device=device).to(dtype) for n, shape in shapes.items()}
    dy = torch.randn(3, rows, width, device=device).to(dtype)
    results = against_float64(lambda backend, **given: (gated_rms_norm(**given, backend=backend),), inputs, [dy])
    return {n: relative_error(a, b) for n, a, b in zip(("y", *(f"d {n}" for n in inputs)), *results, strict=True)}
