"""Correctness cases of the whole hola_attention, the fused Triton function, against the torch backend in float64.

What only the whole has: the keys' norms left by the state's first launch, states saved by the state pass in 16 bits,
the read's gradients added in place to the state's, dv as beta times their sum. Rounded scores may choose other tokens
than exact ones. So both sides read what the fused function chose; its scores are compared on their own, and a
token chosen otherwise ("slots") must have a score as close to the least one cached as rounding explains.

"busy" compares a call with itself while other products keep the GPU busy: what one kernel does too early, before
a product of its own has ended, shows only then. "isolated" compares it with itself while one document holds inf and
NaN: no other document may see a bit of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hola_kernels.attention import hola_attention, rank_tokens
from hola_kernels.checks import segments_of
from hola_kernels.exact_cache import exact_read, select_cache
from hola_kernels.exact_cache.verify_cases import PACKED, _incoming_gradient
from hola_kernels.gated_delta import gated_delta_rule
from hola_kernels.gated_delta.verify_cases import make_inputs
from hola_kernels.merge import merge_outputs
from hola_kernels.verify import poisoned, relative_error

# of o and scores, of q, k, v and parameters, of beta and log_decay: the contract's; float16 has more digits
LIMITS = {"bfloat16": (0.005, 0.008, 0.02), "float16": (0.002, 0.005, 0.005), "float32": (1e-5, 1e-4, 1e-4)}
WIDTHS = ((64, 64), (128, 128), (256, 256), (64, 128))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# "long": one head is too little for a GPU, so the sequence is split into spans; "bounded": tables from shapes alone
KINDS: dict[str, dict[str, Any]] = {
    "packed": {"cu_seqlens": PACKED},
    "rows": {"rows": 2, "length": 600, "score": "e", "read_norm": "l2", "sink": False},
    "betav": {"cu_seqlens": PACKED, "score": "betav"},
    "recency": {"cu_seqlens": PACKED, "score": "recency"},
    "long": {"length": 6000, "heads": 1, "split": True},
    "bounded": {"cu_seqlens": (*PACKED, PACKED[-1], PACKED[-1]), "bounded": True},
    "lengths": {"rows": 3, "length": (1, 63, 64, 65, 255, 256, 257, 500, 1000)},
    "window": {"cu_seqlens": PACKED, "local": "window", "window": 256},
    "far window": {"rows": 2, "length": 900, "local": "window", "window": 320, "score": "recency"},
    "no slots": {"cu_seqlens": PACKED, "slots": 0},
    "window, no slots": {"cu_seqlens": (*PACKED, PACKED[-1]), "bounded": True, "local": "window", "window": 193,
                         "slots": 0},
    "itself": {"cu_seqlens": PACKED, "local": "none", "read_norm": "l2"},
    "long bounded": {"cu_seqlens": (0, 40, 2990, 3000, 3000), "heads": 1, "split": True, "bounded": True},
}
CHOSEN = [*((word, *widths, "packed") for word in DTYPES for widths in WIDTHS),
          *((word, width, width, "rows") for word in DTYPES for width in (128, 256)),
          ("bfloat16", 128, 128, "betav"), ("bfloat16", 128, 128, "long"), ("bfloat16", 256, 256, "long"),
          *(("bfloat16", width, width, "bounded") for width in (64, 128, 256)), ("float32", 64, 64, "bounded"),
          *((word, width, width, "lengths") for word in DTYPES for width in (64, 128, 256)),
          *(("bfloat16", width, width, kind) for width in (64, 128, 256)
            for kind in ("window", "far window", "no slots", "window, no slots", "itself")),
          *(("float32", 128, 128, kind) for kind in ("window", "window, no slots")), ("float16", 256, 256, "window"),
          ("bfloat16", 128, 128, "long bounded"), ("float16", 64, 64, "long"), ("float32", 128, 128, "long")]


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case."""
    return [*((f"hola_attention {word} K={key} V={value} {kind}",
               lambda d=DTYPES[word], k=key, v=value, o=kind: worst(dtype=d, key=k, value=v, **KINDS[o]))
              for word, key, value, kind in CHOSEN),
            *((f"hola_attention bfloat16 K={width} V={width} busy {kind}",
               lambda n=width, c=cu_seqlens: measure_busy(width=n, cu_seqlens=c))
              for width in (64, 128, 256)
              for kind, cu_seqlens in (("one", (0, 20000)), ("packed", (0, 3000, 3001, 20000)))),
            *((f"hola_attention {word} K={width} V={width} isolated{kind}",
               lambda d=DTYPES[word], n=width, o=options: measure_isolated(dtype=d, width=n, **o))
              for word in ("bfloat16", "float32") for width in (64, 128, 256)
              for kind, options in (("", {}), (" bounded", {"bounded": True}))),
            *((f"hola_attention bfloat16 K=128 V=128 isolated {kind}",
               lambda o=options: measure_isolated(dtype=torch.bfloat16, width=128, **o))
              for kind, options in (("rows", {"rows": 3, "length": 600}), ("long", {"cu_seqlens": (0, 4000, 8100)})))]


def worst(*, length: int | tuple[int, ...] = 0, **options: Any) -> dict[str, float]:
    """What `measure` gives, of several lengths the largest error of each output (a NaN is the largest)."""
    found = [measure(length=each, **options) for each in (length if isinstance(length, tuple) else (length,))]
    return {n: max((errors[n] for errors in found), key=lambda error: (error != error, error)) for n in found[0]}


def limit(name: str, output: str) -> float:
    """The largest error of any output; of two scores that were exchanged both may be off."""
    forward, gradient, scalar_gradient = LIMITS[name.split()[1]]
    if output in ("whole", "other numbers"):
        return 0.5
    if output in ("o", "o without gradients", "score", "slots"):
        return 2 * forward if output == "slots" else forward
    return scalar_gradient if output in ("d beta", "d log_decay") else gradient


def measure(*, dtype: torch.dtype, key: int, value: int, cu_seqlens: tuple[int, ...] | None = None, rows: int = 1,
            length: int = 0, heads: int = 2, block: int = 256, slots: int = 64, score: str = "betae",
            read_norm: str = "rms", local: str = "block", window: int | None = None, sink: bool = True,
            split: bool = False, bounded: bool = False, device: str = "cuda", seed: int = 0) -> dict[str, float]:
    """Errors of o, of what the cache ranks by, of its choice and of every gradient, new tensors poisoned.

    Documents cut at `cu_seqlens`, or `rows` of `length` tokens. bounded: cu_seqlens is on the device. split: sequences
    must be processed in spans; "whole" is 1 where they are not.
    """
    rows, length = (1, cu_seqlens[-1]) if cu_seqlens else (rows, length)
    inputs = attention_inputs(rows, length, heads, key, value, dtype, seed, device)
    if not sink:
        inputs["sink"] = None
    exact_inputs = {n: None if x is None else x.detach().double().requires_grad_() for n, x in inputs.items()}
    cache = {"block": block, "slots": slots, "read_norm": read_norm, "local": local, "window": window,
             "cu_seqlens": torch.tensor(cu_seqlens) if cu_seqlens else None}
    given = {**inputs, **cache, "score": score, "backend": "triton"}
    if bounded:
        given |= {"cu_seqlens": torch.tensor(cu_seqlens, device=device),
                  "max_seqlen": int(cache["cu_seqlens"].diff().max())}
    with poisoned(), watched() as seen:
        y = hola_attention(**given)
    with poisoned(), torch.no_grad():
        alone = hola_attention(**given)
    rank = seen["score_MH"].view(rows, length, heads)
    expected, exact_rank = expected_of(exact_inputs, rank, score, cache)
    dy = _incoming_gradient(expected)
    with poisoned():
        found = _gradients(y, inputs, dy)
    wanted = _gradients(expected, exact_inputs, dy)
    errors = {"o": relative_error(y, expected), "o without gradients": relative_error(alone, expected)}
    if slots:
        errors |= {"score": relative_error(rank, exact_rank), "slots": misplaced(seen["slots_UHw"], exact_rank, cache)}
    errors |= {f"d {n}": relative_error(found[n], wanted[n]) for n in wanted}
    return errors | ({"whole": float(seen["layout"].most_spans == 1)} if split else {})


def measure_busy(*, width: int, cu_seqlens: tuple[int, ...], runs: int = 150) -> dict[str, float]:
    """How many tensors of `runs` calls and backward passes differ from those of the first, or hold NaN."""
    inputs = attention_inputs(1, cu_seqlens[-1], 2, width, width, torch.bfloat16, 0, "cuda")
    dy = torch.randn(1, cu_seqlens[-1], 2, width, device="cuda", dtype=torch.bfloat16)
    beside, other = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        y = hola_attention(**inputs, cu_seqlens=torch.tensor(cu_seqlens), backend="triton")
        return [y.detach(), *torch.autograd.grad(y, list(inputs.values()), dy)]

    first, different = run(), torch.zeros((), device="cuda")
    for _ in range(runs):
        with torch.cuda.stream(beside):
            for _ in range(8):
                other @ other
        for found, expected in zip(run(), first, strict=True):
            different += (found != expected).any()  # NaN is not what it is
    return {"other numbers": float(different)}


def measure_isolated(*, dtype: torch.dtype, width: int, cu_seqlens: tuple[int, ...] = (0, 1, 70, 150, 500, 1101),
                     rows: int = 1, length: int = 0, bounded: bool = False) -> dict[str, float]:
    """How many outputs and gradients of the other documents (or rows) change where the middle one's first token holds
    inf or NaN, in one input after the other."""
    rows, length = (1, cu_seqlens[-1]) if rows == 1 else (rows, length)
    inputs = {n: x.detach() for n, x in attention_inputs(rows, length, 2, width, width, dtype, 0, "cuda").items()}
    dy = torch.randn(rows, length, 2, width, device="cuda", dtype=dtype)
    cu = torch.tensor(cu_seqlens, device="cuda" if bounded else "cpu") if rows == 1 else None
    options = {"cu_seqlens": cu, "max_seqlen": length if bounded else None, "backend": "triton"}
    middle = (len(cu_seqlens) - 1) // 2
    start, end = (cu_seqlens[middle], cu_seqlens[middle + 1]) if rows == 1 else (length, 2 * length)
    tokens = ("q", "k", "v", "log_decay", "beta")

    def others(spoiled: dict[str, Tensor]) -> list[Tensor]:
        leaves = {n: x.clone().requires_grad_() for n, x in spoiled.items()}
        y = hola_attention(**leaves, **options)
        found = [y.detach(), *torch.autograd.grad(y, [leaves[n] for n in tokens], dy)]
        return [part for x in found for part in (x.flatten(0, 1)[:start], x.flatten(0, 1)[end:])]

    clean, different = others(inputs), 0
    for name in tokens:
        for bad in (torch.nan, -torch.inf):
            spoiled = {n: x.clone() for n, x in inputs.items()}
            spoiled[name].flatten(0, 1)[start] = bad
            different += sum(not torch.equal(a, b) for a, b in zip(others(spoiled), clean, strict=True))
    return {"other numbers": float(different)}


def attention_inputs(rows: int, length: int, heads: int, key: int, value: int, dtype: torch.dtype, seed: int,
                     device: str) -> dict[str, Tensor]:
    """Arguments of hola_attention with gradients on; q, k, v in dtype, the rest in float32."""
    *tokens, _ = make_inputs(rows * length, 1, heads, key, value, 0.02, None, seed)
    made = {n: x.view(rows, length, *x.shape[1:]) for n, x in zip(("q", "k", "v", "log_decay", "beta"), tokens,
                                                                  strict=True)}
    g = torch.Generator().manual_seed(seed + 1)
    for name, size in (("gamma_q", key), ("gamma_k", key), ("gate", heads), ("sink", heads)):
        made[name] = torch.randn(size, generator=g) * (0.3 if "gamma" in name else 1) + ("gamma" in name)
    return {n: x.to(device, dtype if n in ("q", "k", "v") else torch.float32).requires_grad_() for n, x in made.items()}


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """The scores that a fused call ranks by, the slots it chooses ([U, H, w], of flat tokens) and its layout."""
    from hola_kernels import triton_attention  # on first use: triton may be missing

    seen: dict[str, Any] = {}
    select, layout = triton_attention.select_slots, triton_attention.layout_for

    def select_slots(*, score_MH: Tensor, **options: Any) -> Tensor:
        seen["score_MH"], seen["slots_UHw"] = score_MH, select(score_MH=score_MH, **options)
        return seen["slots_UHw"]

    def layout_for(*arguments: Any) -> Any:
        seen["layout"] = layout(*arguments)
        return seen["layout"]

    with mock.patch.multiple(triton_attention, select_slots=select_slots, layout_for=layout_for):
        yield seen


def expected_of(exact_inputs: dict[str, Tensor], rank: Tensor, score: str,
                cache: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(o, exact scores) in float64, the cache chosen by the scores `rank` [B, T, H] that were found."""
    tokens = {n: exact_inputs[n] for n in ("q", "k", "v", "log_decay", "beta")}
    o_state, written, _ = gated_delta_rule(**tokens, cu_seqlens=cache["cu_seqlens"], backend="torch")
    o_cache, _ = exact_read(**{n: exact_inputs[n] for n in ("q", "k", "v", "gamma_q", "gamma_k", "sink")}, **cache,
                            score=rank.double(), backend="torch")
    cu_seqlens = segments_of(rank, cache["cu_seqlens"])
    exact = rank_tokens(score, written, tokens["v"], tokens["beta"], cu_seqlens, torch.zeros_like(cu_seqlens[1:]))
    return merge_outputs(o_state, o_cache, exact_inputs["gate"], "add", "torch"), exact


def misplaced(chosen_UHw: Tensor, rank: Tensor, cache: dict[str, Any]) -> float:
    """How far a token that only one side chose is from the least score cached, as a share of that; rank [B, T, H]."""
    want_UHw = select_cache(score=rank, block=cache["block"], slots=cache["slots"], cu_seqlens=cache["cu_seqlens"],
                            backend="torch")
    rank_HM = rank.flatten(0, 1).T
    blocks, heads, tokens = want_UHw.shape[0], *rank_HM.shape

    def taken(rows_UHw: Tensor) -> Tensor:
        at_UHw = torch.where(rows_UHw < 0, tokens, rows_UHw.long())
        nowhere = torch.zeros(blocks, heads, tokens + 1, dtype=torch.bool, device=rank.device)
        return nowhere.scatter_(2, at_UHw, True)[..., :-1]

    want_UHM = taken(want_UHw)
    odd_UHM = want_UHM ^ taken(chosen_UHw[:blocks])
    least_UH1 = torch.where(want_UHM, rank_HM, torch.inf).amin(-1, keepdim=True)
    return float(torch.where(odd_UHM, (rank_HM - least_UH1).abs() / least_UH1, 0.0).max())


def _gradients(y: Tensor, inputs: dict[str, Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    used = {n: x for n, x in inputs.items() if x is not None}
    return dict(zip(used, torch.autograd.grad(y, list(used.values()), dy.to(y.dtype)), strict=True))
