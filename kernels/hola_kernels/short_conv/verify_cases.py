"""Correctness cases of the short convolution on the current GPU, against the torch backend in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hola_kernels.short_conv import short_conv
from hola_kernels.verify import poisoned, relative_error

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}
CUTS = (0, 0, 1, 3, 64, 129, 600)


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    made: list[tuple[str, Callable[[], dict[str, float]]]] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (2, 4):
            for cuts in (None, CUTS):
                name = f"{str(dtype).removeprefix('torch.')} short conv W={width}{' packed' if cuts else ''}"
                made.append((name, lambda d=dtype, w=width, c=cuts: measure(dtype=d, width=w, cuts=c)))
        for cuts in (None, CUTS):
            name = f"{str(dtype).removeprefix('torch.')} short conv in sections{' packed' if cuts else ''}"
            made.append((name, lambda d=dtype, c=cuts: measure(dtype=d, width=4, cuts=c, widths=(256, 128, 384))))
    return made


def limit(name: str, output: str) -> float:
    """The largest error of any output that the case `name` may show."""
    return LIMITS[name.split()[0]]


def measure(*, dtype: torch.dtype, width: int, cuts: tuple[int, ...] | None,
            widths: tuple[int, ...] | None = None) -> dict[str, float]:
    """Errors of output, tail after and all gradients, with a tail going in."""
    channels = sum(widths or (520,))
    batch, length = (1, cuts[-1]) if cuts else (2, 300)
    shapes = {"x": (batch, length, channels), "weight": (channels, width),
              "tail": (len(cuts) - 1 if cuts else batch, width - 1, channels)}
    narrow = {n: torch.randn(*shape, device="cuda").to(dtype).requires_grad_() for n, shape in shapes.items()}
    wide = {n: x.detach().double().requires_grad_() for n, x in narrow.items()}
    options = {"return_tail": True, "cu_seqlens": torch.tensor(cuts, device="cuda") if cuts else None}
    with poisoned():
        found = short_conv(**narrow, **options, widths=widths, backend="triton")
        found = found if widths is None else (torch.cat(found[0], -1), found[1])
        weights = [torch.randn(o.shape, device="cuda").to(dtype) for o in found]
        have = torch.autograd.grad(found, list(narrow.values()), weights)
    expected = short_conv(**wide, **options, backend="torch")
    want = torch.autograd.grad(expected, list(wide.values()), [w.double() for w in weights])
    names = ("y", "tail after", *(f"d {n}" for n in narrow))
    return {n: relative_error(a, b) for n, a, b in zip(names, (*found, *have), (*expected, *want), strict=True)}
