"""Correctness cases of attention to kept tokens on the current GPU, against the torch backend in float64.

Errors are the RMS of the difference over the RMS of what is expected. Outputs are filled with NaN before every launch,
so a number that was never written cannot pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hola_kernels.kept_attention import KeptTokens, kept_attention
from hola_kernels.kept_attention.tiles import kept_width_refusal
from hola_kernels.verify import poisoned, relative_error

# of o, of all gradients: the contract's; float16 has more digits
LIMITS = {"bfloat16": (5e-3, 8e-3), "float16": (1e-3, 2e-3), "float32": (1e-5, 1e-4)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PACKED = (0, 0, 1, 64, 65, 700, 700, 1723)
WIDTHS = ((256, 256), (128, 128), (64, 64), (128, 256), (256, 64), (32, 32), (16, 64))
LENGTHS = (1, 63, 64, 65, 255, 256, 257, 500, 1000)


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    made: list[tuple[str, Callable[[], dict[str, float]]]] = []
    for word, dtype in DTYPES.items():
        for key, value in WIDTHS:
            if kept_width_refusal(key, dtype):
                continue
            name = f"{word} kept attention K={key} V={value}"
            sizes = {"dtype": dtype, "key": key, "value": value}
            made += [(f"{name} packed", lambda s=sizes: measure(**s, cu_seqlens=PACKED)),
                     (f"{name} rows", lambda s=sizes: measure(**s, lengths=[600, 600], plain=True))]
        for width in (64, 128, 256):
            name, sizes = f"{word} kept attention K={width} V={width}", {"dtype": dtype, "key": width, "value": width}
            made += [(f"{name} share {share}", lambda s=sizes, f=share: measure(**s, cu_seqlens=PACKED, share=f))
                     for share in (0.0, 0.02, 1.0)]
            made += [(f"{name} long", lambda s=sizes: measure(**s, cu_seqlens=(0, 900, 7000))),
                     (f"{name} lengths", lambda s=sizes: worst_of_lengths(**s)),
                     (f"{name} pieces", lambda s=sizes: measure_pieces(**s))]
        made.append((f"{word} kept attention of a huge sink", lambda d=dtype: measure(
            dtype=d, key=128, value=128, cu_seqlens=PACKED, sink=3e38)))
    made += [(f"{word} kept attention K={width} V={width} isolated",
              lambda d=DTYPES[word], n=width: measure_isolated(dtype=d, width=n))
             for word in ("bfloat16", "float32") for width in (64, 128, 256)]
    made += [(f"bfloat16 kept attention K={width} V={width} busy", lambda n=width: measure_busy(width=n))
             for width in (64, 128, 256)]
    return made


def limit(name: str, output: str) -> float:
    """The largest error of `output` that the case `name` may show."""
    if output == "other numbers":
        return 0.5
    return LIMITS[name.split()[0]][output != "o"]


def measure(*, dtype: torch.dtype, key: int, value: int, lengths: list[int] | None = None,
            cu_seqlens: tuple[int, ...] | None = None, heads: int = 2, share: float | None = None, plain: bool = False,
            sink: float | None = None, seed: int = 0, device: str = "cuda") -> dict[str, float]:
    """Errors of o and all gradients: rows of equal `lengths`, or documents cut at `cu_seqlens`.

    share: of tokens that are kept, by default another one in every head; plain: no sink, no log weights.
    """
    batch, length = (1, cu_seqlens[-1]) if cu_seqlens else (len(lengths), lengths[0])
    leaves = make_inputs(batch, length, heads, key, value, dtype, seed, device)
    if sink is not None:
        leaves["sink"].fill_(sink)
    keep = choose(batch, length, heads, share, seed, device)
    if plain:
        del leaves["sink"], leaves["log_weight"]
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    options = {"keep": keep, "cu_seqlens": torch.tensor(cu_seqlens) if cu_seqlens else None}
    expected = kept_attention(**exact, **options, backend="torch")
    do = incoming_gradient(expected)
    wanted = torch.autograd.grad(expected, list(exact.values()), do.double())
    with poisoned():
        o = kept_attention(**leaves, **options, backend="triton")
        found = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
    return {"o": relative_error(o, expected)} | {
        f"d {n}": relative_error(a, b) for n, a, b in zip(leaves, found, wanted, strict=True)}


def worst_of_lengths(**sizes: Any) -> dict[str, float]:
    """Of every output the largest error at any of the lengths (a NaN is the largest)."""
    found = [measure(**sizes, lengths=[length] * 3) for length in LENGTHS]
    return {n: max((errors[n] for errors in found), key=lambda error: (error != error, error)) for n in found[0]}


def measure_pieces(*, dtype: torch.dtype, key: int, value: int, bounds: tuple[int, ...] = (0, 1, 300, 310, 1300),
                   heads: int = 2, device: str = "cuda") -> dict[str, float]:
    """Errors of two sequences read in pieces that hand the state on, against the whole in float64."""
    x = make_inputs(2, bounds[-1], heads, key, value, dtype, 3, device)
    x["keep"] = choose(2, bounds[-1], heads, None, 3, device)
    exact = {n: y if n == "keep" else y.double() for n, y in x.items()}
    expected = kept_attention(**exact, backend="torch")
    state = KeptTokens.empty(2, heads, key, value, dtype=dtype, device=device)
    pieces = []
    for start, end in itertools.pairwise(bounds):
        piece = {n: y if n == "sink" else y[:, start:end] for n, y in x.items()}
        with poisoned():
            pieces.append(kept_attention(**piece, state=state, backend="triton"))
    return {"o": relative_error(torch.cat(pieces, 1), expected)}


def measure_isolated(*, dtype: torch.dtype, width: int, cu_seqlens: tuple[int, ...] = (0, 1, 70, 150, 500, 1101),
                     device: str = "cuda") -> dict[str, float]:
    """How many outputs and gradients of the other documents change where the middle one's first token holds inf or NaN,
    in one input after the other and in the gradient that comes in."""
    inputs = make_inputs(1, cu_seqlens[-1], 2, width, width, dtype, 0, device)
    keep = choose(1, cu_seqlens[-1], 2, 0.5, 0, device)
    keep[:, cu_seqlens[:-1]] = True
    inputs["do"] = torch.randn(1, cu_seqlens[-1], 2, width, device=device, dtype=dtype)
    middle = (len(cu_seqlens) - 1) // 2
    start, end = cu_seqlens[middle], cu_seqlens[middle + 1]
    tokens = ("q", "k", "v", "log_weight")

    def others(spoiled: dict[str, Tensor]) -> list[Tensor]:
        leaves = {n: x.clone().requires_grad_() for n, x in spoiled.items() if n != "do"}
        o = kept_attention(**leaves, keep=keep, cu_seqlens=torch.tensor(cu_seqlens), backend="triton")
        found = [o.detach(), *torch.autograd.grad(o, [leaves[n] for n in tokens], spoiled["do"])]
        return [part for x in found for part in (x[0, :start], x[0, end:])]

    clean, different = others(inputs), 0
    for name in (*tokens, "do"):
        for bad in (torch.nan, torch.inf):
            spoiled = {n: x.clone() for n, x in inputs.items()}
            spoiled[name][0, start] = bad
            different += sum(not torch.equal(a, b) for a, b in zip(others(spoiled), clean, strict=True))
    return {"other numbers": float(different)}


def measure_busy(*, width: int, cu_seqlens: tuple[int, ...] = (0, 3000, 3001, 12000),
                 runs: int = 100) -> dict[str, float]:
    """How many tensors of `runs` calls and backward passes differ from those of the first, or hold NaN, while other
    products keep the GPU busy."""
    inputs = {n: x.requires_grad_() for n, x in make_inputs(1, cu_seqlens[-1], 2, width, width, torch.bfloat16, 0,
                                                            "cuda").items()}
    keep, do = choose(1, cu_seqlens[-1], 2, 0.3, 0, "cuda"), torch.randn_like(inputs["v"])
    beside, other = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        o = kept_attention(**inputs, keep=keep, cu_seqlens=torch.tensor(cu_seqlens), backend="triton")
        return [o.detach(), *torch.autograd.grad(o, list(inputs.values()), do)]

    first, different = run(), torch.zeros((), device="cuda")
    for _ in range(runs):
        with torch.cuda.stream(beside):
            for _ in range(8):
                other @ other
        for found, expected in zip(run(), first, strict=True):
            different += (found != expected).any()  # NaN is not what it is
    return {"other numbers": float(different)}


def make_inputs(batch: int, length: int, heads: int, key: int, value: int, dtype: torch.dtype, seed: int,
                device: str) -> dict[str, Tensor]:
    """q, k, v in dtype, sink and log weights (of shares between 0 and 1) in float32."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    made = {"q": normal(batch, length, heads, key).to(dtype), "k": 2 * normal(batch, length, heads, key).to(dtype),
            "v": normal(batch, length, heads, value).to(dtype), "sink": normal(heads),
            "log_weight": normal(batch, length, heads).sigmoid().log()}
    return {n: x.to(device) for n, x in made.items()}


def choose(batch: int, length: int, heads: int, share: float | None, seed: int, device: str) -> Tensor:
    """keep [B, T, H]; without a share, from a tenth of the tokens in the first head to 0.7 of them in the last."""
    shares = torch.linspace(0.1, 0.7, heads) if share is None else torch.full((heads,), share)
    return (torch.rand(batch, length, heads, generator=torch.Generator().manual_seed(seed + 7)) < shares).to(device)


def incoming_gradient(o: Tensor) -> Tensor:
    """Noise plus o itself, representable in bfloat16.

    Of noise alone the sink's gradient is a sum whose terms cancel: there the rounding of o, saved in 16 bits, is up to
    1e-2 of what is left, whatever the kernel does. With o in it the terms add up.
    """
    noise = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.device)
    return (noise + o.detach()).to(torch.bfloat16)
