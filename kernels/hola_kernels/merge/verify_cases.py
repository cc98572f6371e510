"""Correctness cases of the merge of two outputs on the current GPU, against the torch backend in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hola_kernels.merge import merge_outputs
from hola_kernels.options import MERGES
from hola_kernels.verify import against_float64, relative_error

LIMITS = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 1e-3}


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    return [(f"{str(dtype).removeprefix('torch.')} merge {merge} V={width}",
             lambda d=dtype, m=merge, v=width: measure(dtype=d, merge=m, tokens=1003, width=v))
            for dtype in (torch.bfloat16, torch.float16, torch.float32) for merge in MERGES
            for width in (33, 64, 128, 256)]


def limit(name: str, output: str) -> float:
    """The largest error of any output that the case `name` may show."""
    return LIMITS[name.split()[0]]


def measure(*, dtype: torch.dtype, merge: str, tokens: int, width: int, device: str = "cuda") -> dict[str, float]:
    """Errors of output and gradients of two rows of three heads; the gates are a section of a wider projection."""
    rows, heads = 2, 3
    size = {"add": 0, "two": 2, "convex": width}[merge]
    wide = 4 * torch.randn(tokens, rows, heads * size + 5, device=device)
    gate = torch.randn(heads, device=device) if merge == "add" else wide[..., 2: 2 + heads * size].to(dtype)
    inputs = {"state": torch.randn(rows, tokens, heads, width, device=device).to(dtype),
              "exact": 3 * torch.randn(rows, tokens, heads, width, device=device).to(dtype), "gate": gate}
    do = torch.randn(rows, tokens, heads, width, device=device).to(dtype)

    def run(backend: str, state: torch.Tensor, exact: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor]:
        if merge != "add":
            gate = gate.transpose(0, 1).unflatten(-1, (heads, size))
        return (merge_outputs(state, exact, gate, merge, backend=backend),)

    (o, *found), (expected, *wanted) = against_float64(run, inputs, [do])
    errors = {"o": relative_error(o, expected)}
    return errors | {f"d{name}": relative_error(have, want)
                     for name, have, want in zip(inputs, found, wanted, strict=True)}
