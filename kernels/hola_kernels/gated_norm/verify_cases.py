"""Correctness cases of the gated norm on the current GPU, against the torch backend in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hola_kernels.gated_norm import gated_rms_norm
from hola_kernels.verify import poisoned, relative_error

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    return [(f"{str(dtype).removeprefix('torch.')} gated norm V={width}",
             lambda d=dtype, v=width: measure(dtype=d, width=v))
            for dtype in (torch.bfloat16, torch.float16, torch.float32) for width in (64, 96, 128, 256)]


def limit(name: str, output: str) -> float:
    """The largest error of any output that the case `name` may show."""
    return LIMITS[name.split()[0]]


def measure(*, dtype: torch.dtype, width: int) -> dict[str, float]:
    """Errors of the output and all gradients of more rows than the backward pass has programs."""
    shapes = {"x": (3, 9001, width), "gate": (3, 9001, width), "weight": (width,)}
    narrow = {n: torch.randn(*shape, device="cuda").to(dtype).requires_grad_() for n, shape in shapes.items()}
    wide = {n: x.detach().double().requires_grad_() for n, x in narrow.items()}
    with poisoned():
        y = gated_rms_norm(**narrow, backend="triton")
        dy = torch.randn(y.shape, device="cuda").to(dtype)
        have = torch.autograd.grad(y, list(narrow.values()), dy)
    expected = gated_rms_norm(**wide, backend="torch")
    want = torch.autograd.grad(expected, list(wide.values()), dy.double())
    return {n: relative_error(a, b) for n, a, b in zip(("y", *(f"d {n}" for n in narrow)), (y, *have),
                                                       (expected, *want), strict=True)}
