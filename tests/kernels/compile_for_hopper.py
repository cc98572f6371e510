"""Compiles the kernels of a call for compute capability 9.0 on a machine without a GPU, and says what they need.

    python tests/kernels/compile_for_hopper.py '{"operation": "attention", "dtype": "bfloat16", "width": 256}'

Triton asks its driver for the device and lets it launch; this one is a Hopper that launches nothing, so a call on CPU
tensors goes through all its kernels and returns what happened to be in memory. Prints one JSON object: of every kernel
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

from hola_kernels import backend, gated_rms_norm, hola_attention, hola_attention_step, short_conv, short_conv_step
from hola_kernels.cross_entropy import cross_entropy_
from hola_kernels.exact_cache.read_configs import read_config
from hola_kernels.exact_cache.triton_best import best_rows
from hola_kernels.exact_cache.triton_forward import launch_inverse_norms
from hola_kernels.exact_cache.triton_read import Blocks, exact_read_backward
from hola_kernels.exact_cache.triton_split_read import begin_split_read, launch_read_own, launch_read_rest
from hola_kernels.gated_delta import triton_rule
from hola_kernels.gates import decay_and_strength
from hola_kernels.rms_norm import rms_norm
from hola_kernels.state import HolaState
from hola_kernels.swiglu import swiglu
from hola_kernels.verify_cases import attention_inputs

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoGpu:
    """What Triton's compiler asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

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


def ranks(dtype: torch.dtype, width: int) -> None:
    """What context ranks launch besides: the read in two passes and its backward, with an incoming memory, and a
    rank's best tokens."""
    x = attention_inputs(1, 700, 2, width, width, dtype, 0, "cpu")
    x = {name: value.detach().flatten(0, 1) if value.ndim > 2 else value.detach() for name, value in x.items()}
    blocks = Blocks.cut(torch.tensor([0, 700]), 700, block=256, slots=64, dense=False, incoming=True)
    norm = launch_inverse_norms(x_MHD=x["k"], mean=1 / width)
    read = begin_split_read(
        q_MHK=x["q"], k_RHK=x["k"], v_RHV=x["v"], key_norm_RH=norm, gamma_q=x["gamma_q"], gamma_k=x["gamma_k"],
        sink_H=x["sink"], units=blocks.units, mean=1 / width, tile=read_config(width, width, dtype).forward, opened=9,
        opened_segments=1)
    launch_read_own(read, (0, blocks.units.units))
    slots = torch.zeros(blocks.units.units, 2, 64, dtype=torch.int32)
    y, o_cache, lse, query_norm = launch_read_rest(read, gate_H=x["gate"], o_state_MHV=x["v"], slots_UHw=slots,
                                                   incoming=True)
    exact_read_backward(**{name: x[name] for name in ("q", "k", "v", "gamma_q", "gamma_k", "sink", "gate")},
                        key_norm=norm, o_cache=o_cache, lse=lse, query_norm=query_norm, slots_UHw=slots, blocks=blocks,
                        mean=1 / width, dy=y)
    best_rows(x["beta"], ((0, 700),), 64)
    best_rows(x["beta"].repeat(200, 1), ((0, 140_000),), 64)  # so many spans that their lists fill a wider tile


def step(dtype: torch.dtype, width: int) -> None:
    x = {name: value.detach() for name, value in attention_inputs(1, 3, 2, width, width, dtype, 0, "cpu").items()}
    one = {name: x[name][0] for name in ("q", "k", "v", "log_decay", "beta")}
    state = HolaState.empty(3, 2, width, width, dtype=dtype, block=256, slots=64)
    hola_attention_step(**{**x, **one}, state=state, backend="triton")
    short_conv_step(x=torch.zeros(3, 4 * width, dtype=dtype), weight=torch.zeros(4 * width, 4, dtype=dtype),
                    tail=torch.zeros(3, 3, 4 * width, dtype=dtype), backend="triton")


def around(dtype: torch.dtype, width: int) -> None:
    """Every small operation, forward and backward."""
    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, requires_grad=True)

    wide = 4 * width
    outputs = [short_conv(x=zeros(1, 300, wide), weight=zeros(wide, 4), backend="triton"),
               gated_rms_norm(x=zeros(300, width), gate=zeros(300, width), weight=zeros(width), backend="triton"),
               rms_norm(x=zeros(300, wide), weight=zeros(wide), backend="triton"),
               swiglu(x=zeros(300, 2, wide), backend="triton"),
               *decay_and_strength(x=zeros(1, 300, 8), heads=4, A_log=zeros(4).float(), dt_bias=zeros(4).float(),
                                   backend="triton")]
    for y in outputs:
        y.backward(torch.ones_like(y), retain_graph=True)
    cross_entropy_(logits=torch.zeros(300, 32000, dtype=dtype), labels=torch.zeros(300, dtype=torch.int64),
                   weight=torch.zeros(300), backend="triton")


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
    asked = json.loads(sys.argv[1])
    compiled, run = {}, JITFunction.run

    def compile_only(self: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> object:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = kernel
        return kernel

    driver.set_active(NoGpu())
    JITFunction.run = compile_only
    backend.triton_problem = lambda _: None
    torch.manual_seed(0)
    {"attention": attention, "long": long, "ranks": ranks, "step": step, "around": around}[asked["operation"]](
        getattr(torch, asked["dtype"]), asked["width"])
    print(json.dumps({f"{kernel.metadata.name} {key[:6]}": needs(kernel) for key, kernel in compiled.items()}))


if __name__ == "__main__":
    main()
