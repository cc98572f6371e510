"""Times and memory of attention to kept tokens against the share that is kept, beside SDPA and FlexAttention.

    PYTHONPATH=kernels python kernels/benchmarks/bench_kept_attention.py [--shape B,T,H,K ...] [--shares 0.01 ... 1]

Every method reads the same tokens: those kept before the query, and the query's own. SDPA gets a dense mask
[1, H, T, T], which is left out where it would be larger than 8 GiB; beside it stands causal SDPA, which reads all.
FlexAttention gets the same mask as a function, compiled; a block of 128 x 128 pairs is skipped where nothing in it is
kept. No speed is printed for a method whose output or gradients differ from ours. ms are medians of device time
(forward, forward and backward); GiB is the peak above what the inputs take.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from hola_kernels import kept_attention
from hola_kernels.kept_attention import verify_cases

SHAPES = ("1,16384,8,128", "1,32768,4,256", "16,2048,4,256", "1,131072,8,128")
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
MASK_BYTES = 8 * 2**30
TOLERANCE = 2e-2  # between two results in bfloat16
Call = Callable[..., Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="*", default=SHAPES, metavar="B,T,H,K")
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, metavar="F")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, commit {commit()}")
    print("| B, T, H, K = V | share | method | forward ms | fwd+bwd ms | GiB |\n|---|---|---|---|---|---|")
    for shape in (tuple(map(int, text.split(","))) for text in options.shape):
        wrong = gate(shape[3])
        if wrong:
            print(f"| {shape} | | ours | WRONG {wrong} | | |")
            continue
        for share in options.shares:
            for row in rows(shape, share):
                print(f"| {', '.join(map(str, shape))} | {share} | {row} |", flush=True)


def gate(width: int) -> dict[str, float]:
    """Errors of our kernels that are over their limits, against float64 on documents of a few hundred tokens."""
    errors = verify_cases.measure(dtype=torch.bfloat16, key=width, value=width, cu_seqlens=verify_cases.PACKED)
    return {n: e for n, e in errors.items() if not e < verify_cases.limit("bfloat16", n)}


def rows(shape: tuple[int, int, int, int], share: float) -> Iterator[str]:
    """The table's rows of one shape and share."""
    batch, length, heads, width = shape
    made = verify_cases.make_inputs(batch, length, heads, width, width, torch.bfloat16, 0, "cuda")
    inputs = {n: made[n].requires_grad_() for n in ("q", "k", "v")}
    keep, do = verify_cases.choose(batch, length, heads, share, 0, "cuda"), torch.randn_like(made["v"])
    expected = None
    for name, make in METHODS.items():
        call = make(keep)
        if call is None:
            yield f"{name} | not run: mask too large | | "
            continue
        try:
            found = results(call, inputs, do)
            if expected is None:
                expected = found
            if name != "sdpa, causal, all tokens" and any(difference(a, b) > TOLERANCE
                                                          for a, b in zip(found, expected, strict=True)):
                yield f"{name} | WRONG | | "
                continue
            del found
            yield f"{name} | {measure(call, inputs, do)}"
        except torch.OutOfMemoryError:
            yield f"{name} | out of memory | | "
        torch.cuda.empty_cache()


def ours(keep: Tensor) -> Call:
    return lambda q, k, v: kept_attention(q=q, k=k, v=v, keep=keep, backend="triton")


def sdpa_mdone(keep: Tensor) -> Call | None:
    batch, length, heads = keep.shape
    if batch * heads * length**2 > MASK_BYTES:
        return None
    mask = keep.permute(0, 2, 1)[:, :, None].expand(-1, -1, length, -1).tril(-1)
    mask |= torch.eye(length, dtype=torch.bool, device=keep.device)
    return lambda q, k, v: heads_first(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask), q, k, v)


def sdpa_causal(_: Tensor) -> Call:
    return lambda q, k, v: heads_first(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), q, k, v)


def flex(keep: Tensor) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, length, heads = keep.shape

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i == j) | ((j < i) & keep[b, j, h])

    mask = create_block_mask(seen, batch, heads, length, length, device=keep.device, _compile=True)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: heads_first(lambda *x: compiled(*x, block_mask=mask), q, k, v)


METHODS: dict[str, Callable[[Tensor], Call | None]] = {
    "ours": ours, "flex": flex, "sdpa, mdone": sdpa_mdone, "sdpa, causal, all tokens": sdpa_causal}


def heads_first(read: Call, *tensors: Tensor) -> Tensor:
    return read(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)


def results(call: Call, inputs: dict[str, Tensor], do: Tensor) -> list[Tensor]:
    o = call(**inputs)
    return [o.detach(), *torch.autograd.grad(o, list(inputs.values()), do)]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def measure(call: Call, inputs: dict[str, Tensor], do: Tensor) -> str:
    """Table cells: ms forward, ms forward and backward, peak GiB of the latter."""
    def forward() -> None:
        with torch.no_grad():
            call(**inputs)

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results(call, inputs, do)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    times = [triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median")
             for run in (forward, lambda: results(call, inputs, do))]
    return f"{times[0]:.3f} | {times[1]:.3f} | {peak:.2f}"


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                           text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
