"""Correctness cases of decay and write strength on the current GPU, against the torch backend in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hola_kernels.gates import decay_and_strength
from hola_kernels.verify import poisoned, relative_error

# of d x; the rest is float32 at any dtype of x: some 25 roundings, a few each for exp, log and two divisions of a GPU
LIMITS = {"float32": 3e-6, "bfloat16": 4e-3, "float16": 1e-3}
EXTREMES = (-30.0, -15.0, 15.0, 30.0)  # of softplus and sigmoid


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    made: list[tuple[str, Callable[[], dict[str, float]]]] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for heads in (1, 4, 16):
            for decay in (True, False) if heads == 4 else (True,):
                for tokens in (1, 63, 5000, 200_000):
                    name = f"{str(dtype).removeprefix('torch.')} gates H={heads} T={tokens}"
                    made.append((name if decay else f"{name} no decay", lambda d=dtype, h=heads, t=tokens, a=decay:
                                 measure(dtype=d, heads=h, tokens=t, decay=a)))
    made.append(("bfloat16 gates H=4 T=5000 beta in (0, 2)", lambda: measure(
        dtype=torch.bfloat16, heads=4, tokens=5000, beta_range=2)))
    return made


def limit(name: str, output: str) -> float:
    """The largest error of any output that the case `name` may show."""
    return LIMITS[name.split()[0]] if output == "d x" else LIMITS["float32"]


def measure(*, dtype: torch.dtype, heads: int, tokens: int, decay: bool = True, beta_range: int = 1,
            device: str = "cuda", rows: int = 2) -> dict[str, float]:
    """Errors of both outputs and all gradients; x lies inside a transposed, wider projection, as a mixer has it."""
    total_width, begin = 2 * heads + 70, 16
    section = slice(begin, begin + 2 * heads + 48)
    noise = functools.partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(8))
    projected = 3 * noise(tokens, rows, total_width)
    for number, extreme in enumerate(EXTREMES):
        projected[5 + number::29] = extreme
    x = projected.to(dtype).transpose(0, 1)[..., section].requires_grad_()
    inputs = {"x": x}
    if decay:
        inputs |= {"A_log": noise(heads), "dt_bias": noise(heads) - 2}
        inputs = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    # gradients of mean one: sums of noise alone would be small beside their terms, and show nothing but rounding
    gradients = [1 + noise(rows, tokens, heads) for _ in range(2)]
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    whole = torch.full((tokens, rows, total_width), float("nan"), dtype=dtype, device=device).transpose(0, 1)
    options = {"heads": heads, "beta_range": beta_range}
    with poisoned():
        found = decay_and_strength(**inputs, **options, backend="triton", dx_buffer=lambda: whole[..., section])
        have = torch.autograd.grad(found[not decay:], list(inputs.values()), gradients[not decay:])
    expected = decay_and_strength(**exact, **options, backend="torch")
    want = torch.autograd.grad(expected[not decay:], list(exact.values()), [g.double() for g in gradients[not decay:]])
    names = ("log_decay", "beta", *(f"d {name}" for name in inputs))
    errors = {name: relative_error(a, b)
              for name, a, b in zip(names, (*found, *have), (*expected, *want), strict=True)}
    return errors | {"around the buffer": 0.0 if _untouched(whole, section, have[0]) else float("nan")}


def _untouched(whole: Tensor, section: slice, dx: Tensor) -> bool:
    """Whether dx lies in its buffer and nothing else was written."""
    around = torch.cat([whole[..., :section.start], whole[..., section.stop:]], -1)
    return bool(around.isnan().all()) and dx.data_ptr() == whole[..., section].data_ptr()
