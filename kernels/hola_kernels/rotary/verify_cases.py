"""Correctness cases of rotary positions on the current GPU, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hola_kernels.rotary import rotary_
from hola_kernels.verify import poisoned, relative_error

LIMITS = {"float32": 1e-3, "bfloat16": 4e-3, "float16": 2e-3}  # angles of float32 are off by 1e-4 after 2,000 tokens
BOUNDS = (0, 0, 1, 64, 900, 2003)


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    return [(f"{str(dtype).removeprefix('torch.')} rotary K={width} H={heads} {'rows' if bounds is None else 'packed'}",
             lambda d=dtype, k=width, h=heads, c=bounds: measure(dtype=d, width=k, heads=h, bounds=c))
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for width, heads in ((64, 32), (128, 9), (96, 3), (256, 4)) for bounds in (BOUNDS, None)]


def limit(name: str, output: str) -> float:
    """The largest error of any output that the case `name` may show."""
    return LIMITS[name.split()[0]]


def measure(*, dtype: torch.dtype, width: int, heads: int, bounds: tuple[int, ...] | None,
            device: str = "cuda") -> dict[str, float]:
    """Errors of output and gradient of a part of a wider projection."""
    rows = 2 if bounds is None else 1
    whole = torch.randn(rows, 2003, heads * width + 64, device=device).to(dtype)
    x = whole[..., : heads * width].unflatten(-1, (heads, width))
    leaf, dy = x.clone().requires_grad_(), torch.randn(x.shape, device=device).to(dtype)
    how = {"base": 1e4, "cu_seqlens": None if bounds is None else torch.tensor(bounds)}
    exact = leaf.detach().double().requires_grad_()
    expected = rotary_(x=exact, backend="reference", **how)
    want, = torch.autograd.grad(expected, exact, dy.double())
    untouched = whole[..., heads * width:].clone()
    with poisoned():
        y = rotary_(x=leaf.clone(), backend="triton", **how)
        dx, = torch.autograd.grad(y, leaf, dy)
        rotary_(x=x, backend="triton", **how)
    beside = 0.0 if torch.equal(whole[..., heads * width:], untouched) else float("nan")
    return {"y": relative_error(y, expected), "in place": relative_error(x, expected) + beside,
            "dx": relative_error(dx, want)}
