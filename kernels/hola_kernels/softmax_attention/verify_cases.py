"""Correctness cases of softmax attention on the current GPU, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hola_kernels.softmax_attention import softmax_attention
from hola_kernels.verify import poisoned, relative_error

LIMITS = {"o": 5e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3}
BOUNDS = (0, 0, 1, 64, 129, 129, 385, 1000, 1000)
Run = Callable[[], dict[str, float]]


def cases() -> list[tuple[str, Run]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    made: list[tuple[str, Run]] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width, heads, keys in ((64, 4, 4), (64, 8, 2), (128, 4, 1), (256, 2, 2)):
            for window in (None, 1, 64, 300):
                for earlier, bounds in ((0, BOUNDS), (200, BOUNDS), (0, None)):
                    name = (f"{str(dtype).removeprefix('torch.')} softmax attention K={width} H={heads} G={keys} "
                            f"window={window} earlier={earlier} {'rows' if bounds is None else 'packed'}")
                    made.append((name, lambda d=dtype, k=width, h=heads, g=keys, w=window, e=earlier, c=bounds: measure(
                        dtype=d, width=k, heads=h, keys=g, window=w, earlier=e, bounds=c)))
    return made


def limit(name: str, output: str) -> float:
    """The largest error of `output` that the case `name` may show."""
    return 2e-5 if name.startswith("float32") else LIMITS[output]


def measure(*, dtype: torch.dtype, width: int, heads: int, keys: int, window: int | None, earlier: int,
            bounds: tuple[int, ...] | None, device: str = "cuda", length: int = 1000) -> dict[str, float]:
    """Errors of output and gradients; two rows where there are no documents."""
    rows = 2 if bounds is None else 1
    shapes = {"q": (rows, length, heads, width), "k": (rows, earlier + length, keys, width),
              "v": (rows, earlier + length, keys, width)}
    x = {n: torch.randn(shape, device=device).to(dtype).requires_grad_() for n, shape in shapes.items()}
    dy = torch.randn(shapes["q"], device=device).to(dtype)
    how = {"cu_seqlens": None if bounds is None else torch.tensor(bounds), "earlier": earlier, "window": window}
    with poisoned():
        y = softmax_attention(**x, **how)
        found = torch.autograd.grad(y, list(x.values()), dy)
    exact_inputs = {n: value.detach().double().requires_grad_() for n, value in x.items()}
    expected = softmax_attention(**exact_inputs, **how, backend="reference")
    want = torch.autograd.grad(expected, list(exact_inputs.values()), dy.double())
    errors = {"o": relative_error(y, expected)}
    for name, have, exact in zip(x, found, want, strict=True):
        if float(exact.norm()) > 1e-9:  # in a window of one token nothing depends on q and k
            errors[f"d{name}"] = relative_error(have, exact)
    return errors
