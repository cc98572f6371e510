"""Correctness cases of one decoded token, against the torch backend in float64: twenty steps and the memory then.

Three sequences of unequal length decode together; two fill their block on the way, one has never had a full one. Both
sides start from the same memory and see the same tokens, so what the memory holds must be the same rows, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hola_kernels.attention import hola_attention
from hola_kernels.attention_step import hola_attention_step
from hola_kernels.gated_delta.step import gated_delta_step
from hola_kernels.short_conv import short_conv_step
from hola_kernels.state import HolaState
from hola_kernels.verify import poisoned, relative_error
from hola_kernels.verify_cases import DTYPES, LIMITS, attention_inputs

STEPS = 20
TOKENS = ("q", "k", "v", "log_decay", "beta")
OPTIONS: dict[str, dict[str, Any]] = {
    "betae": {}, "e, l2, no sink": {"score": "e", "read_norm": "l2", "sink": False}, "betav": {"score": "betav"},
    "recency": {"score": "recency"}, "few slots": {"slots": 5}}
CHOSEN = [*(("bfloat16", width, width, "betae") for width in (16, 32, 64, 128, 256)), ("bfloat16", 128, 256, "betae"),
          *(("float32", 64, 64, option) for option in OPTIONS), ("float16", 256, 256, "betav")]


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case."""
    made = [(f"attention step {word} K={key} V={value} {option}",
             lambda d=DTYPES[word], k=key, v=value, o=option: measure(dtype=d, key=k, value=v, **OPTIONS[o]))
            for word, key, value, option in CHOSEN]
    return [*made, *((f"conv step {word} W={width}", lambda d=dtype, w=width: measure_conv(dtype=d, width=w))
                     for word, dtype in DTYPES.items() for width in (1, 2, 3, 4))]


def limit(name: str, output: str) -> float:
    """The largest error of any output; what is copied is copied exactly."""
    dtype = name.split()[2]
    return {"o": LIMITS[dtype][0], "o of the state": 1e-5, "score": 1e-5, "state": 1e-5, "memory": 1e-12,
            "y": LIMITS[dtype][0], "tail": 1e-12}[output]


def measure(*, dtype: torch.dtype, key: int, value: int, heads: int = 2, block: int = 256, slots: int = 64,
            before: tuple[int, ...] = (3, 250, 500), steps: int = STEPS, score: str = "betae", read_norm: str = "rms",
            sink: bool = True, device: str = "cuda") -> dict[str, float]:
    """Errors of the outputs of all steps and of the memory after them, of sequences of so many tokens `before`."""
    made = attention_inputs(len(before), max(before) + steps, heads, key, value, dtype, 0, device)
    given = {n: x.detach() for n, x in made.items()} | ({} if sink else {"sink": None})
    exact_inputs = {n: None if x is None else x.double() for n, x in given.items()}
    options = {"score": score, "read_norm": read_norm}
    memory = _memory(given, before, {"block": block, "slots": slots, **options})
    exact = memory.map(lambda x: x.double() if x.is_floating_point() else x.clone())
    found, expected = [], []
    for step in range(steps):
        with poisoned():
            found.append(hola_attention_step(**_token(given, before, step), **options, state=memory, backend="triton"))
        token = _token(exact_inputs, before, step)
        expected.append(hola_attention_step(**token, **options, state=exact, backend="torch"))
    memory_error = float((memory.cache_position != exact.cache_position).any() or (memory.length != exact.length).any())
    memory_error += sum(relative_error(getattr(memory, n), getattr(exact, n))
                        for n in ("cache_k", "cache_v", "open_k", "open_v"))
    given_token, exact_token = ({n: x for n, x in _token(tokens, before, steps - 1).items() if n in TOKENS}
                                for tokens in (given, exact_inputs))
    delta, _ = gated_delta_step(**given_token, state=memory.state.clone(), backend="triton")
    wanted, _ = gated_delta_step(**exact_token, state=exact.state.clone(), backend="torch")
    scores = [x.cache_score.masked_fill(x.cache_position < 0, 0) for x in (memory, exact)]
    return {"o": relative_error(torch.stack(found), torch.stack(expected)),
            "o of the state": relative_error(delta, wanted), "state": relative_error(memory.state, exact.state),
            "score": relative_error(*scores), "memory": memory_error}


def measure_conv(*, dtype: torch.dtype, width: int, channels: int = 520, device: str = "cuda") -> dict[str, float]:
    """Errors of three steps of the convolution and of the tail after them."""
    x, weight, tail = (torch.randn(*size, device=device).to(dtype)
                       for size in ((3, 2, channels), (channels, width), (2, width - 1, channels)))
    exact, found, expected = tail.double(), [], []
    for now in x:
        with poisoned():
            found.append(short_conv_step(x=now, weight=weight, tail=tail, backend="triton"))
        expected.append(short_conv_step(x=now.double(), weight=weight.double(), tail=exact, backend="torch"))
    return {"y": relative_error(torch.stack(found), torch.stack(expected)), "tail": relative_error(tail, exact)}


def _memory(given: dict[str, Tensor | None], before: tuple[int, ...], options: dict[str, Any]) -> HolaState:
    """The memory of the sequences after their first tokens."""
    packed = {n: torch.cat([x[row, :n_before] for row, n_before in enumerate(before)])[None] if n in TOKENS else x
              for n, x in given.items()}
    cu_seqlens = torch.tensor([0, *before]).cumsum(0)
    with torch.no_grad():
        return hola_attention(**packed, **options, cu_seqlens=cu_seqlens, return_state=True, backend="torch")[1]


def _token(inputs: dict[str, Tensor | None], before: tuple[int, ...], step: int) -> dict[str, Tensor | None]:
    at = torch.tensor(before, device=inputs["q"].device) + step
    rows = torch.arange(len(before), device=at.device)
    return {n: x[rows, at] if n in TOKENS else x for n, x in inputs.items()}
