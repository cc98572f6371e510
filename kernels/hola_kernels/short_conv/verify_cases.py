"""Correctness cases of the short convolution on the current GPU, against the torch backend in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hola_kernels.short_conv import short_conv
from hola_kernels.verify import against_float64, relative_error

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}
CU_SEQLENS = (0, 0, 1, 3, 64, 129, 600)


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    made: list[tuple[str, Callable[[], dict[str, float]]]] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (2, 4):
            for cu_seqlens in (None, CU_SEQLENS):
                name = f"{str(dtype).removeprefix('torch.')} short conv W={width}{' packed' if cu_seqlens else ''}"
                made.append((name, lambda d=dtype, w=width, c=cu_seqlens: measure(dtype=d, width=w, cu_seqlens=c)))
        for cu_seqlens in (None, CU_SEQLENS):
            name = f"{str(dtype).removeprefix('torch.')} short conv in sections{' packed' if cu_seqlens else ''}"
            made.append((name, lambda d=dtype, c=cu_seqlens: measure(
                dtype=d, width=4, cu_seqlens=c, widths=(256, 128, 384))))
    made.append(("bfloat16 short conv of 4.3 million tokens", lambda: measure(
        dtype=torch.bfloat16, width=4, cu_seqlens=(0, 2_000_001, 4_300_000), widths=(8, 8, 16))))
    return made


def limit(name: str, output: str) -> float:
    """The largest error of any output that the case `name` may show."""
    return LIMITS[name.split()[0]]


def measure(*, dtype: torch.dtype, width: int, cu_seqlens: tuple[int, ...] | None,
            widths: tuple[int, ...] | None = None) -> dict[str, float]:
    """Errors of output, tail after and all gradients, with a tail going in."""
    channels = sum(widths or (520,))
    batch, length = (1, cu_seqlens[-1]) if cu_seqlens else (2, 300)
    shapes = {"x": (batch, length, channels), "weight": (channels, width),
              "tail": (len(cu_seqlens) - 1 if cu_seqlens else batch, width - 1, channels)}
    inputs = {n: torch.randn(*shape, device="cuda").to(dtype) for n, shape in shapes.items()}
    options = {"return_tail": True, "cu_seqlens": torch.tensor(cu_seqlens, device="cuda") if cu_seqlens else None}

    def run(backend: str, **given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sections = widths if backend == "triton" else None
        y, tail = short_conv(**given, **options, widths=sections, backend=backend)
        return y if sections is None else torch.cat(y, -1), tail

    gradients = [torch.randn(inputs[n].shape, device="cuda").to(dtype) for n in ("x", "tail")]
    names = ("y", "tail after", *(f"d {n}" for n in inputs))
    return {n: relative_error(a, b) for n, a, b in zip(names, *against_float64(run, inputs, gradients), strict=True)}
