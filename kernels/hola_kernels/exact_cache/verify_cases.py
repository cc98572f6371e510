"""Correctness cases of cache attention on the current GPU, against the torch backend in float64.

Both sides choose from the same float32 scores, so they read the same tokens. Errors are the
RMS of the difference over the RMS of what is expected. Outputs are filled with NaN before
every launch, so a number that was never written cannot pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from hola_kernels.exact_cache import exact_read, select_cache
from hola_kernels.options import CacheOptions
from hola_kernels.verify import poisoned, relative_error

NAMES = ("q", "k", "v", "gamma_q", "gamma_k", "sink", "gate", "o_state")
LIMITS = {"float32": {"o": 1e-5, "gradient": 1e-4}, "bfloat16": {"o": 5e-3, "gradient": 8e-3},
          "float16": {"o": 1e-3, "gradient": 2e-3}}
PACKED = (0, 0, 1, 64, 65, 700, 700, 1723)
LOCAL_PARTS = {"window of a block": {"local": "window", "window": 256}, "window": {"local": "window", "window": 321},
               "short window, small blocks": {"local": "window", "window": 193, "block": 64, "slots": 20},
               "window without slots": {"local": "window", "window": 320, "slots": 0}, "without slots": {"slots": 0},
               "itself": {"local": "none"}, "without a norm": {"read_norm": "none"}}
WIDTHS = ((256, 256), (128, 128), (64, 64), (128, 256), (256, 64), (32, 32), (16, 64))


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype, and run() measures its errors."""
    made: list[tuple[str, Callable[[], dict[str, float]]]] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        word = str(dtype).removeprefix("torch.")
        for key, value in WIDTHS:
            made.append((f"{word} cache attention K={key} V={value} T=600",
                         lambda d=dtype, k=key, v=value: measure_read(dtype=d, key=k, value=v, lengths=[600, 600])))
            made.append((f"{word} cache attention K={key} V={value} packed",
                         lambda d=dtype, k=key, v=value: measure_read(dtype=d, key=k, value=v, cu_seqlens=PACKED)))
            two = f"{word} cache attention in two passes K={key} V={value}"
            made += [(f"{two} {late} late, {'a' if sink else 'no'} sink",
                      lambda d=dtype, k=key, v=value, n=late, s=sink: measure_split(
                          dtype=d, key=k, value=v, cu_seqlens=(0, 300, 301, 301, 365, 1723), late=n, sink=s))
                     for late, sink in ((0, True), (100, True), (255, False))]
        made += [(f"{word} cache attention K={n} V={n} {part}", lambda d=dtype, n=n, o=options: measure_read(
            dtype=d, key=n, value=n, cu_seqlens=PACKED, **o)) for n in (64, 128, 256)
            for part, options in LOCAL_PARTS.items()]
        made += [(f"{word} cache attention K={width} V={width} long", lambda d=dtype, n=width: measure_read(
            dtype=d, key=n, value=n, cu_seqlens=(0, 900, 7000))) for width in (64, 256)]  # over windows of blocks
        made.append((f"{word} cache attention of a huge sink", lambda d=dtype: measure_read(
            dtype=d, key=128, value=128, cu_seqlens=PACKED, sink=3e38)))
        made.append((f"{word} cache attention with an incoming memory", lambda d=dtype: measure_pieces(dtype=d)))
        made.append((f"{word} cache attention with an incoming memory, long", lambda d=dtype: measure_pieces(
            dtype=d, bounds=(0, 300, 310, 6000))))
    for length in (1, 63, 64, 65, 255, 256, 257, 500, 1000, 6000):
        made.append((f"bfloat16 cache attention K=128 V=128 T={length}",
                     lambda n=length: measure_read(dtype=torch.bfloat16, key=128, value=128, lengths=[n])))
    made.append(("float32 selection", measure_selection))
    return made


def limit(name: str, output: str) -> float:
    """The largest error of `output` that the case `name` may show."""
    if output == "wrong slots":
        return 0.5
    return LIMITS[name.split()[0]]["o" if output in ("o", "o_cache") else "gradient"]


def measure_read(*, dtype: torch.dtype, key: int, value: int, lengths: list[int] | None = None,
                 cu_seqlens: tuple[int, ...] | None = None, heads: int = 2, block: int = 256, slots: int = 64,
                 read_norm: str = "rms", local: str = "block", window: int | None = None, config: object = None,
                 seed: int = 0, sink: float | None = None, device: str = "cuda") -> dict[str, float]:
    """Errors of the combined read and all its gradients: rows of equal `lengths`, or documents cut at `cu_seqlens`."""
    from hola_kernels.exact_cache import read_configs, triton_read

    batch, length = (1, cu_seqlens[-1]) if cu_seqlens else (len(lengths), lengths[0])
    inputs = make_inputs(batch * length, heads, key, value, dtype, seed, device)
    score = inputs.pop("score")
    if sink is not None:
        inputs["sink"].fill_(sink)
    bounds = torch.tensor(cu_seqlens or range(0, batch * length + 1, length), device=device)
    options = CacheOptions(block, slots, read_norm=read_norm, local=local, window=window)
    blocks = triton_read.CacheBlocks.cut(bounds, batch * length, options, equal_length=cu_seqlens is None)
    exact = {n: x.double().requires_grad_() for n, x in inputs.items()}
    own = {n: exact[n].view(batch, length, *exact[n].shape[1:]) for n in ("q", "k", "v")}
    o_cache, _ = exact_read(**own, **{n: exact[n] for n in ("gamma_q", "gamma_k", "sink")}, **options.of_the_read,
                            score=score.double().view(batch, length, heads), backend="torch",
                            cu_seqlens=bounds if cu_seqlens else None)
    expected_y = exact["o_state"] + exact["gate"].sigmoid()[:, None] * o_cache.flatten(0, 1)
    dy = _incoming_gradient(expected_y)
    expected = _gradients(expected_y, exact, dy)
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    chosen = dict(read_configs.TABLE)
    if config is not None:
        read_configs.TABLE.update(dict.fromkeys(chosen, config))
    try:
        with poisoned():
            y = triton_read.cache_attention_combine(**leaves, score=score, blocks=blocks)
            found = _gradients(y, leaves, dy)
    finally:
        read_configs.TABLE.update(chosen)
    return {"o": relative_error(y, expected_y)} | {n: relative_error(found[n], expected[n]) for n in NAMES}


def measure_split(*, dtype: torch.dtype, key: int, value: int, cu_seqlens: tuple[int, ...], late: int = 0,
                  sink: bool = True, heads: int = 2, block: int = 256, slots: int = 64,
                  device: str = "cuda") -> dict[str, float]:
    """Errors of the read in two passes: y ("o") and o_cache against float64, lse against the one pass.

    late: first tokens of the first document whose keys and values are NaN until the first pass is over.
    """
    from hola_kernels.exact_cache import triton_forward, triton_read, triton_split_read
    from hola_kernels.exact_cache.read_configs import read_config

    x = make_inputs(cu_seqlens[-1], heads, key, value, dtype, 4, device)
    score, bounds = x.pop("score"), torch.tensor(cu_seqlens, device=device)
    x["sink"] = x["sink"] if sink else None
    blocks = triton_read.CacheBlocks.cut(bounds, cu_seqlens[-1], CacheOptions(block, slots), equal_length=False)
    exact = {n: None if y is None else y.double() for n, y in x.items()}
    o_cache, _ = exact_read(**{n: exact[n][None] for n in ("q", "k", "v")}, score=score.double()[None], block=block,
                            **{n: exact[n] for n in ("gamma_q", "gamma_k", "sink")}, slots=slots, backend="torch",
                            cu_seqlens=bounds)
    expected_y = exact["o_state"] + exact["gate"].sigmoid()[:, None] * o_cache[0]

    mean = triton_read.norm_mean("rms", key)
    norm = triton_forward.launch_inverse_norms(x_MHD=x["k"], mean=mean)
    keys = {"k_RHK": x["k"], "v_RHV": x["v"], "key_norm_RH": norm}
    shared = {"q_MHK": x["q"], "gamma_q": x["gamma_q"], "gamma_k": x["gamma_k"], "sink_H": x["sink"], "mean": mean,
              "table": blocks.table, "tile": read_config(key, value, dtype).forward}
    chosen = triton_read.select_slots(score_MH=score, plan=blocks.plan, slots=slots)
    rest = {"gate_H": x["gate"], "o_state_MHV": x["o_state"], "slots_UHw": chosen, "incoming": late > 0}
    filling = {n: y.clone() for n, y in keys.items()}
    with poisoned():
        _, _, lse, query_norm = triton_forward.launch_read_forward(**shared, **keys, **rest)
        read = triton_split_read.allocate_split_read(**shared, **filling, carried_tokens=late, carried_segments=1)
        for y in filling.values():
            y[:late] = float("nan")
        for run in read.runs((1, 2)):
            triton_split_read.launch_local_read(read, run)
        for n, y in filling.items():
            y[:late] = keys[n][:late]
        found = triton_split_read.launch_cached_read(read, **rest)
    return {"o": relative_error(found[0], expected_y), "o_cache": relative_error(found[1], o_cache[0]),
            "lse": relative_error(found[2], lse), "query_norm": relative_error(found[3], query_norm)}


def measure_pieces(*, dtype: torch.dtype, bounds: tuple[int, ...] = (0, 300, 310, 1024, 1300), key: int = 128,
                   heads: int = 2, block: int = 256, slots: int = 64, device: str = "cuda") -> dict[str, float]:
    """Errors of a sequence read in pieces that hand the memory on, against the whole in float64."""
    inputs = make_inputs(bounds[-1], heads, key, key, dtype, 3, device)
    sizes = {"block": block, "slots": slots}
    inputs = {n: x[None] if x.ndim > 1 else x for n, x in inputs.items() if n not in ("gate", "o_state")}
    score = inputs.pop("score")
    exact = {n: x.double().requires_grad_() for n, x in inputs.items()}
    expected_o, _ = exact_read(**exact, score=score.double(), backend="torch", **sizes)
    do = _incoming_gradient(expected_o)
    expected = _gradients(expected_o, exact, do)
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    memory, outputs = None, []
    with poisoned():
        for start, end in itertools.pairwise(bounds):
            piece = {n: x[:, start:end] if x.ndim > 2 else x for n, x in leaves.items()}
            o, memory = exact_read(**piece, score=score[:, start:end], memory=memory, backend="triton", **sizes)
            outputs.append(o)
        o = torch.cat(outputs, 1)
        found = _gradients(o, leaves, do)
    return {"o": relative_error(o, expected_o)} | {n: relative_error(found[n], expected[n]) for n in found}


def measure_selection() -> dict[str, float]:
    """Slots that differ from the torch choice, with ties, over several spans and packed documents, and over so many
    spans that their best fill several tiles of registers."""
    from hola_kernels.exact_cache import triton_read

    wrong = 0
    for batch, length, cu_seqlens in ((2, 2048, None), (1, 9000, None), (1, 9000, (0, 0, 1, 300, 5000, 5000, 9000)),
                                (1, 70_000, None), (1, 300_000, (0, 1000, 300_000))):
        score = torch.randint(-40, 200, (batch, length, 3), device="cuda").float() / 8
        bounds = torch.tensor(cu_seqlens or range(0, batch * length + 1, length), device="cuda")
        expected = select_cache(score=score, cu_seqlens=bounds if cu_seqlens else None, backend="torch")
        blocks = triton_read.CacheBlocks.cut(bounds, batch * length, CacheOptions(),
                                             equal_length=cu_seqlens is None)
        found = triton_read.select_slots(score_MH=score.flatten(0, 1), plan=blocks.plan, slots=64)
        wrong += int((found[: expected.shape[0]] != expected).sum())
    return {"wrong slots": float(wrong)}


def make_inputs(tokens: int, heads: int, key: int, value: int, dtype: torch.dtype, seed: int,
                device: str) -> dict[str, Tensor]:
    """Flat inputs; keys twice as long as queries, gammas off one, scores positive."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    tokens_like = {"q": normal(tokens, heads, key), "k": 2 * normal(tokens, heads, key),
                   "v": normal(tokens, heads, value), "o_state": normal(tokens, heads, value)}
    return {n: x.to(dtype) for n, x in tokens_like.items()} | {
        "gamma_q": 1 + 0.3 * normal(key), "gamma_k": 1 + 0.3 * normal(key), "sink": normal(heads),
        "gate": normal(heads), "score": normal(tokens, heads).abs()}


def _incoming_gradient(y: Tensor) -> Tensor:
    """Noise plus y itself, representable in bfloat16.

    Of noise alone the gradients of gate and sink are sums whose terms cancel: there the rounding of o, saved in
    16 bit, is up to 1e-2 of what is left, whatever the kernel does. With y in it the terms add up.
    """
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    return (noise + y.detach()).to(torch.bfloat16)


def _gradients(y: Tensor, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    return dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype)), strict=True))
