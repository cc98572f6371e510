"""Times the exact cache (selection, read), the short convolution, the gated norm and SwiGLU on one GPU.

    PYTHONPATH=kernels python kernels/benchmarks/bench_exact_cache.py [--shape B,T,H,K,V ...]

No speed is printed for a shape whose results are wrong. Times are medians of the device time of
one call after another; floors are the bytes that must cross HBM at the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from hola_kernels import gated_rms_norm, short_conv
from hola_kernels.exact_cache import triton_read, verify_cases
from hola_kernels.options import CacheOptions
from hola_kernels.swiglu import swiglu

SHAPES = ("16,2048,4,256,256", "16,2048,8,128,128", "8,2048,8,256,256", "1,32768,16,128,128", "1,131072,4,256,256")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="*", default=SHAPES, metavar="B,T,H,K,V")
    shapes = [tuple(map(int, shape.split(","))) for shape in parser.parse_args().shape]
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, commit {commit()}, "
          f"copy {bandwidth / 1e12:.2f} TB/s")
    print(f"{'B, T, H, K, V':26} {'part':22} {'ms':>7} {'floor':>7}")
    for batch, length, heads, key, value in shapes:
        errors = verify_cases.measure_read(dtype=torch.bfloat16, key=key, value=value, lengths=[700, 700])
        wrong = {n: e for n, e in errors.items() if not e < verify_cases.limit("bfloat16", n)}
        if wrong:
            print(f"{(batch, length, heads, key, value)!s:26} WRONG {wrong}")
            continue
        for part, (run, gigabytes) in read_parts(batch, length, heads, key, value).items():
            floor = f"{1e12 * gigabytes / bandwidth:7.3f}" if gigabytes else f"{'':7}"
            print(f"{(batch, length, heads, key, value)!s:26} {part:22} {median(run):7.3f} {floor}")
    for part, (run, gigabytes) in around_parts().items():
        print(f"{'32768 tokens':26} {part:22} {median(run):7.3f} {1e12 * gigabytes / bandwidth:7.3f}")


def read_parts(batch: int, length: int, heads: int, key: int, value: int) -> dict[str, tuple[Callable, float]]:
    """part -> (call, GB that must cross HBM)."""
    tokens = batch * length
    inputs = verify_cases.make_inputs(tokens, heads, key, value, torch.bfloat16, 0, "cuda")
    score = inputs.pop("score")
    cu_seqlens = torch.arange(0, tokens + 1, length, device="cuda")
    blocks = triton_read.CacheBlocks.cut(cu_seqlens, tokens, CacheOptions(), equal_length=True)
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}
    dy = torch.randn_like(inputs["v"])

    def forward() -> torch.Tensor:
        return triton_read.cache_attention_combine(**inputs, score=score, blocks=blocks)

    def both() -> None:
        torch.autograd.grad(forward(), list(inputs.values()), dy)

    def select() -> None:
        triton_read.select_slots(score_MH=score, plan=blocks.plan, slots=64)

    number = tokens * heads * 2e-9
    once = number * (2 * key + 4 * value)  # q, k, v, o_state in; y and o_cache out
    return {"selection": (select, tokens * heads * 4e-9), "read forward": (forward, once),
            "read fwd+bwd": (both, once + number * (4 * key + 4 * value))}


def around_parts(tokens: int = 32768, channels: int = 3072, heads: int = 4, width: int = 256,
                 inner: int = 2816) -> dict[str, tuple[Callable, float]]:
    """The operations around the read, at the shape of a 1,024-wide layer."""
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    x, weight = random(16, tokens // 16, channels), random(channels, 4)
    rows, gate, scale = random(tokens, heads, width), random(tokens, heads, width), random(width)
    dx, drows = torch.randn_like(x), torch.randn_like(rows)
    both, dinner = random(tokens, 2 * inner), random(tokens, inner).detach()

    def conv() -> torch.Tensor:
        return short_conv(x=x, weight=weight, backend="triton")

    def norm() -> torch.Tensor:
        return gated_rms_norm(x=rows, gate=gate, weight=scale, backend="triton")

    def mlp() -> torch.Tensor:
        return swiglu(x=both, backend="triton")

    channel_bytes, head_bytes, middle = (tokens * numbers * 2e-9 for numbers in (channels, heads * width, inner))
    return {"short conv forward": (conv, 2 * channel_bytes),
            "short conv fwd+bwd": (lambda: torch.autograd.grad(conv(), [x, weight], dx), 5 * channel_bytes),
            "gated norm forward": (norm, 3 * head_bytes),
            "gated norm fwd+bwd": (lambda: torch.autograd.grad(norm(), [rows, gate, scale], drows), 8 * head_bytes),
            "swiglu forward": (mlp, 3 * middle),
            "swiglu fwd+bwd": (lambda: torch.autograd.grad(mlp(), both, dinner), 8 * middle)}


def median(run: Callable) -> float:
    """Median device milliseconds of a call, without the launch gaps: the calls are recorded as a CUDA graph."""
    return triton.testing.do_bench_cudagraph(run, rep=60, return_mode="median")


def copy_bandwidth() -> float:
    """Bytes a second of a large device copy, read and written bytes counted."""
    x = torch.randn(1 << 30, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / (triton.testing.do_bench(lambda: y.copy_(x), return_mode="median") * 1e-3)


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                           text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
