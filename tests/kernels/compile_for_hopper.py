"""Compiles the kernels of a call for compute capability 9.0 (or another) on a machine without a GPU, and says what
they need.

    python tests/kernels/compile_for_hopper.py '{"operation": "attention", "dtype": "bfloat16", "width": 256}'

    python tests/kernels/compile_for_hopper.py '{"operation": "attention", "width": 128, ..., "capability": 86}'

Triton takes the device from its driver, which launches; this one is a Hopper that launches nothing, so a call on CPU
tensors goes through all its kernels and returns whatever is in memory. Prints one JSON object: of every kernel
the bytes of shared memory and of stack (spilled registers), how many products read registers, and which of these
something writes meanwhile (`warpgroup_registers`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from warpgroup_registers import overwritten, parse, register_operand

from hola_kernels import (
    backend,
    gated_rms_norm,
    hola_attention,
    hola_attention_step,
    shared_memory,
    short_conv,
    short_conv_step,
)
from hola_kernels.cross_entropy import cross_entropy_
from hola_kernels.exact_cache.read_configs import read_config
from hola_kernels.exact_cache.triton_best import best_rows
from hola_kernels.exact_cache.triton_forward import launch_inverse_norms
from hola_kernels.exact_cache.triton_read import CacheBlocks, cache_attention_backward
from hola_kernels.exact_cache.triton_split_read import allocate_split_read, launch_cached_read, launch_local_read
from hola_kernels.gated_delta import triton_rule
from hola_kernels.gates import decay_and_strength
from hola_kernels.kept_attention import kept_attention
from hola_kernels.kept_attention import verify_cases as kept
from hola_kernels.merge import merge_outputs
from hola_kernels.options import CacheOptions
from hola_kernels.rms_norm import rms_norm
from hola_kernels.rotary import rotary_
from hola_kernels.state import HolaState
from hola_kernels.swiglu import swiglu
from hola_kernels.verify_cases import attention_inputs

BLOCK_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoGpu:
    """What Triton's compiler needs of a driver."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int | None = None) -> int:
        return 0


def attention(dtype: torch.dtype, width: int) -> None:
    x = attention_inputs(1, 512, 2, width, width, dtype, 0, "cpu")
    y = hola_attention(**x, backend="triton", cu_seqlens=torch.tensor([0, 100, 512]))
    torch.autograd.grad(y, list(x.values()), torch.ones_like(y))


def long(dtype: torch.dtype, width: int) -> None:
    """One sequence in spans side by side, and tokens that stay cached over many blocks."""
    triton_rule.span_chunks = lambda *_: 20
    x = attention_inputs(1, 5000, 1, width, width, dtype, 0, "cpu")
    y = hola_attention(**x, backend="triton", cu_seqlens=torch.tensor([0, 5000]))
    torch.autograd.grad(y, list(x.values()), torch.ones_like(y))


def windows(dtype: torch.dtype, width: int) -> None:
    """Cache attention with a sliding window, with slots and without."""
    for slots in (64, 0):
        x = attention_inputs(1, 700, 2, width, width, dtype, 0, "cpu")
        y = hola_attention(**x, backend="triton", cu_seqlens=torch.tensor([0, 100, 700]), local="window", window=320,
                           slots=slots)
        torch.autograd.grad(y, list(x.values()), torch.ones_like(y))


def ranks(dtype: torch.dtype, width: int) -> None:
    """What context ranks launch besides: the read in two passes and its backward, with an incoming memory, and a
    rank's best tokens."""
    x = attention_inputs(1, 700, 2, width, width, dtype, 0, "cpu")
    x = {name: value.detach().flatten(0, 1) if value.ndim > 2 else value.detach() for name, value in x.items()}
    blocks = CacheBlocks.cut(torch.tensor([0, 700]), 700, CacheOptions(), equal_length=False, incoming=True)
    norm = launch_inverse_norms(x_MHD=x["k"], mean=1 / width)
    read = allocate_split_read(
        q_MHK=x["q"], k_RHK=x["k"], v_RHV=x["v"], key_norm_RH=norm, gamma_q=x["gamma_q"], gamma_k=x["gamma_k"],
        sink_H=x["sink"], table=blocks.table, mean=1 / width, tile=read_config(width, width, dtype).forward,
        carried_tokens=9, carried_segments=1)
    launch_local_read(read, (0, blocks.table.count))
    slots = torch.zeros(blocks.table.count, 2, 64, dtype=torch.int32)
    y, o_cache, lse, query_norm = launch_cached_read(read, gate_H=x["gate"], o_state_MHV=x["v"], slots_UHw=slots,
                                                   incoming=True)
    cache_attention_backward(**{name: x[name] for name in ("q", "k", "v", "gamma_q", "gamma_k", "sink", "gate")},
                        key_norm=norm, o_cache=o_cache, lse=lse, query_norm=query_norm, slots_UHw=slots, blocks=blocks,
                        mean=1 / width, dy=y)
    best_rows(x["beta"], ((0, 700),), 64)
    best_rows(x["beta"].repeat(200, 1), ((0, 140_000),), 64)  # so many spans that their lists fill a larger tile


def step(dtype: torch.dtype, width: int) -> None:
    x = {name: value.detach() for name, value in attention_inputs(1, 3, 2, width, width, dtype, 0, "cpu").items()}
    one = {name: x[name][0] for name in ("q", "k", "v", "log_decay", "beta")}
    state = HolaState.empty(3, 2, width, width, dtype=dtype, block=256, slots=64)
    hola_attention_step(**{**x, **one}, state=state, backend="triton")
    short_conv_step(x=torch.zeros(3, 4 * width, dtype=dtype), weight=torch.zeros(4 * width, 4, dtype=dtype),
                    tail=torch.zeros(3, 3, 4 * width, dtype=dtype), backend="triton")


def kept_tokens(dtype: torch.dtype, width: int) -> None:
    """Attention to kept tokens, with sink and log weights, forward and backward."""
    x = {name: value.requires_grad_() for name, value in kept.make_inputs(1, 512, 2, width, width, dtype, 0,
                                                                          "cpu").items()}
    y = kept_attention(**x, keep=kept.choose(1, 512, 2, 0.5, 0, "cpu"), cu_seqlens=torch.tensor([0, 100, 512]),
                       backend="triton")
    torch.autograd.grad(y, list(x.values()), torch.ones_like(y))


def around(dtype: torch.dtype, width: int) -> None:
    """Every small operation, forward and backward."""
    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, requires_grad=True)

    channels = 4 * width
    outputs = [short_conv(x=zeros(1, 300, channels), weight=zeros(channels, 4), backend="triton"),
               gated_rms_norm(x=zeros(300, width), gate=zeros(300, width), weight=zeros(width), backend="triton"),
               rms_norm(x=zeros(300, channels), weight=zeros(channels), backend="triton"),
               swiglu(x=zeros(300, 2, channels), backend="triton"),
               rotary_(x=zeros(1, 300, 4, width).clone(), base=1e4, backend="triton"),
               *(merge_outputs(zeros(1, 300, 2, width), zeros(1, 300, 2, width), gate, merge, backend="triton")
                 for merge, gate in (("add", zeros(2)), ("two", zeros(1, 300, 2, 2)),
                                     ("convex", zeros(1, 300, 2, width)))),
               *decay_and_strength(x=zeros(1, 300, 8), heads=4, A_log=zeros(4).float(), dt_bias=zeros(4).float(),
                                   backend="triton")]
    for y in outputs:
        y.backward(torch.ones_like(y), retain_graph=True)
    cross_entropy_(logits=torch.zeros(300, 32000, dtype=dtype), labels=torch.zeros(300, dtype=torch.int64),
                   weight=torch.zeros(300), backend="triton")


def far(dtype: torch.dtype, width: int) -> None:
    """More tokens and sequences than the second axis of a grid has room for."""
    x = torch.zeros(1, 4_200_000, width, dtype=dtype, requires_grad=True)
    short_conv(x=x, weight=torch.zeros(width, 4, dtype=dtype), backend="triton").backward(torch.zeros_like(x))
    many = 66_000
    short_conv_step(x=torch.zeros(many, width, dtype=dtype), weight=torch.zeros(width, 4, dtype=dtype),
                    tail=torch.zeros(many, 3, width, dtype=dtype), backend="triton")


def needs(kernel: triton.compiler.CompiledKernel) -> dict[str, int | list[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources, sass = (subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True,
                                          check=True).stdout for option in ("--dump-resource-usage", "-sass"))
    program = parse(sass)
    return {"shared": kernel.metadata.shared, "stack": int(re.search(r"STACK:(\d+)", resources)[1]),
            "register products": sum(bool(register_operand(x)) for x in program), "overwritten": overwritten(program)}


def main() -> None:
    request = json.loads(sys.argv[1])
    compiled, run, axes = {}, JITFunction.run, [1, 1]

    def compile_only(self: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> object:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        for axis, size in enumerate(grid[1:]):
            axes[axis] = max(axes[axis], size)
        compiled[kernel.hash] = kernel
        return kernel

    capability = request.get("capability", 90)
    driver.set_active(NoGpu(capability))
    shared_memory.block_bytes = lambda: BLOCK_BYTES[capability]
    JITFunction.run = compile_only
    backend.triton_problem = lambda *_: None
    torch.manual_seed(0)
    operations = {"attention": attention, "windows": windows, "long": long, "ranks": ranks, "step": step,
                  "kept": kept_tokens, "around": around, "far": far}
    operations[request["operation"]](getattr(torch, request["dtype"]), request["width"])
    if request["operation"] == "far":
        print(json.dumps({"axes": axes}))
        return
    print(json.dumps({f"{kernel.metadata.name} {key[:6]}": needs(kernel) for key, kernel in compiled.items()}))


if __name__ == "__main__":
    main()
