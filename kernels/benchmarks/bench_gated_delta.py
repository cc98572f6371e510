"""Times the gated delta rule with scores: correctness gate, then medians, memory and rates as a Markdown table.

    PYTHONPATH=kernels python kernels/benchmarks/bench_gated_delta.py [--peer] [--graph] [--shape B,T,H,K,V]

--peer times flash-linear-attention's chunk_gated_delta_rule in the same process on the same inputs (without scores).
--graph: as replayed CUDA graphs, without the host. Nothing is timed where the gate fails. FLOPs are those of the
definition (6 K V a token and head forward, three times that with the backward pass), not the work done; bytes are the
inputs, outputs and gradients, each once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from timing import milliseconds
from torch import Tensor

from hola_kernels import gated_delta_rule
from hola_kernels.gated_delta.verify_cases import KINDS, limit, measure

SHAPES = ((16, 2048, 4, 256, 256), (16, 2048, 8, 128, 128), (8, 2048, 8, 256, 256), (1, 32768, 16, 128, 128),
          (1, 131072, 4, 256, 256))
Operation = Callable[..., Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="store_true", help="also time flash-linear-attention, where it is installed")
    parser.add_argument("--shape", action="append", metavar="B,T,H,K,V", help="instead of the standard shapes")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs: the device's time alone")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"{Path(__file__).stem}: no CUDA device; there is nothing to time")
    shapes = [tuple(map(int, shape.split(","))) for shape in options.shape] if options.shape else SHAPES
    dtype = getattr(torch, options.dtype)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
          f"commit {commit()}, {options.dtype}{', CUDA graphs' if options.graph else ''}\n")
    wrong = [line for key, value in sorted({shape[3:] for shape in shapes}) for line in gate(key, value, dtype)]
    if wrong:
        print("nothing timed, the gate fails:", *wrong, sep="\n  ")
        return 1
    operations: dict[str, Operation] = {"ours": ours}
    if options.peer:
        operations["FLA"] = peer()
    print("| B, T, H, K, V | | forward ms | forward + backward ms | peak extra GiB | TFLOP/s | TB/s |\n"
          "|---|---|---|---|---|---|---|")
    for shape in shapes:
        inputs, do = make_inputs(shape, dtype)
        for name, operation in operations.items():
            print(row(shape, name, operation, inputs, do, graph=options.graph), flush=True)
        del inputs, do
        torch.cuda.empty_cache()
    return 0


def gate(key: int, value: int, dtype: torch.dtype) -> list[str]:
    """Outputs of the kernels that are further from float64 than they may be."""
    wrong = []
    for kind, case in KINDS.items():
        name = f"gated_delta {str(dtype).removeprefix('torch.')} K={key} V={value} {kind}"
        errors = measure(dtype=dtype, key=key, value=value, device="cuda", **case)
        wrong += [f"{name}: {output} {error:.1e}" for output, error in errors.items()
                  if not error <= limit(name, output)]
    return wrong


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    batch, length, heads, key, value = shape
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device="cuda")

    inputs = {"q": normal(batch, length, heads, key).to(dtype), "k": normal(batch, length, heads, key).to(dtype),
              "v": normal(batch, length, heads, value).to(dtype),
              "log_decay": -torch.nn.functional.softplus(normal(batch, length, heads) - 3),
              "beta": normal(batch, length, heads).sigmoid()}
    return {name: x.requires_grad_() for name, x in inputs.items()}, normal(batch, length, heads, value).to(dtype)


def row(shape: tuple[int, ...], name: str, operation: Operation, inputs: dict[str, Tensor], do: Tensor, *,
        graph: bool) -> str:
    batch, length, heads, key, value = shape

    def forward() -> Tensor:
        with torch.no_grad():
            return operation(**inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(operation(**inputs), list(inputs.values()), do)

    both()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    one, two = (milliseconds(f, graph=graph) for f in (forward, both))
    flops = 3 * 6 * batch * length * heads * key * value
    tensors = [*inputs.values(), do]
    moved = sum(x.numel() * x.element_size() for x in [*tensors, *tensors])
    return (f"| {', '.join(map(str, shape))} | {name} | {one:.3f} | {two:.3f} | {peak:.2f} | {flops / two / 1e9:.0f} | "
            f"{moved / two / 1e9:.2f} |")


def ours(**inputs: Tensor) -> Tensor:
    return gated_delta_rule(**inputs, backend="triton")[0]


def peer() -> Operation:
    """flash-linear-attention's operation on our arguments (the L2 norms inside, as here)."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def run(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        return chunk_gated_delta_rule(q, k, v, log_decay, beta, use_qk_l2norm_in_kernel=True)[0]

    return run


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                           text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
