"""Times hola_attention (state, scores, selection, cache attention) beside flash attention and, if installed, FLA.

    PYTHONPATH=kernels python kernels/benchmarks/bench_hola_attention.py [--peer] [--graph] [--shape B,T,H,K,V]

One process, the same q, k, v. Correctness gate first, against the float64 torch backend on a shorter sequence, forward
and every gradient; nothing is timed where it fails. Columns as in bench_gated_delta.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from bench_gated_delta import SHAPES, commit, make_inputs, peer, row
from torch import Tensor

from hola_kernels import hola_attention

LIMITS = {torch.bfloat16: (5e-3, 8e-3, 2e-2), torch.float16: (5e-3, 8e-3, 2e-2), torch.float32: (1e-5, 1e-4, 1e-4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="store_true", help="also time flash-linear-attention's gated delta rule")
    parser.add_argument("--shape", action="append", metavar="B,T,H,K,V", help="instead of the standard shapes")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs: the device's time alone")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"{Path(__file__).stem}: no CUDA device; there is nothing to time")
    shapes = [tuple(map(int, shape.split(","))) for shape in options.shape] if options.shape else SHAPES
    dtype = getattr(torch, options.dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, commit {commit()}, "
          f"{options.dtype}{', CUDA graphs' if options.graph else ''}\n")
    wrong = [line for key, value in sorted({shape[3:] for shape in shapes}) for line in gate(key, value, dtype)]
    if wrong:
        print("nothing timed, the gate fails:", *wrong, sep="\n  ")
        return 1
    print("| B, T, H, K, V | | forward ms | forward + backward ms | peak extra GiB | TFLOP/s | TB/s |\n"
          "|---|---|---|---|---|---|---|")
    for shape in shapes:
        inputs, do = make_inputs(shape, dtype)
        print(row(shape, "hola_attention", ours(shape), inputs, do, graph=options.graph), flush=True)
        if options.peer:
            print(row(shape, "FLA gated delta rule, no cache", peer(), inputs, do, graph=options.graph), flush=True)
        if shape[3] == shape[4] and shape[1] <= 32768:
            plain = {name: inputs[name] for name in ("q", "k", "v")}
            print(row(shape, "flash attention (SDPA)", softmax_attention, plain, do, graph=options.graph), flush=True)
        del inputs, do
        torch.cuda.empty_cache()
    return 0


def ours(shape: tuple[int, ...], device: str = "cuda", dtype: torch.dtype = torch.float32, backend: str = "triton"):
    """hola_attention of one layer's fixed parameters, as a function of its tokens."""
    heads, key = shape[2], shape[3]
    g = torch.Generator().manual_seed(1)

    def near(value: float, *size: int) -> Tensor:
        return (value + 0.2 * torch.randn(*size, generator=g)).to(device, dtype).requires_grad_()

    parameters = {"gamma_q": near(1, key), "gamma_k": near(1, key), "gate": near(-1, heads), "sink": near(0, heads)}

    def run(**tokens: Tensor) -> Tensor:
        return hola_attention(**tokens, **parameters, backend=backend)

    run.parameters = parameters
    return run


def gate(key: int, value: int, dtype: torch.dtype) -> list[str]:
    """Outputs and gradients further from float64 than they may be, at 700 tokens."""
    shape = (2, 700, 2, key, value)
    inputs, do = make_inputs(shape, dtype)
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in inputs.items()}
    fast, slow = ours(shape), ours(shape, "cpu", torch.float64, "torch")
    for name, parameter in fast.parameters.items():
        slow.parameters[name].data.copy_(parameter.detach().cpu())
    found, expected = fast(**inputs), slow(**exact)
    have = torch.autograd.grad(found, [*inputs.values(), *fast.parameters.values()], do)
    want = torch.autograd.grad(expected, [*exact.values(), *slow.parameters.values()], do.cpu().double())
    names = ["o", *(f"d{name}" for name in (*inputs, *fast.parameters))]
    out_limit, token_limit, other_limit = LIMITS[dtype]
    wrong = []
    for name, x, y in zip(names, [found, *have], [expected, *want], strict=True):
        error = float((x.detach().cpu().double() - y.detach()).norm() / y.detach().norm())
        limit = out_limit if name == "o" else token_limit if name in ("dq", "dk", "dv") else other_limit
        if not error <= limit:
            wrong.append(f"hola_attention K={key} V={value} {name}: {error:.1e}, allowed {limit:.0e}")
    return wrong


def softmax_attention(*, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


if __name__ == "__main__":
    sys.exit(main())
