"""Small runs that check whether the components work here: kernels, collectives, disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hola_kernels import gated_rms_norm, hola_attention, short_conv
from hola_kernels.gates import decay_and_strength
from hola_kernels.verify import relative_error

# largest relative error (RMS) of outputs and of gradients: those of the tests, and of bf16's own rounding
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.005, 0.02)}
DISK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Check:
    """One line: what was tried, whether it is right, and what was found."""

    name: str
    passed: bool
    found: str


def kernel_checks(device: torch.device) -> list[Check]:
    """Each backend that can run here against the definition in float64: forward and every gradient."""
    runs = [("torch", torch.float32)]
    if device.type == "cuda":
        runs += [("triton", torch.float32), ("triton", torch.bfloat16)]
    return [_kernel_check(backend, dtype, device) for backend, dtype in runs]


def _kernel_check(backend: str, dtype: torch.dtype, device: torch.device) -> Check:
    name = f"kernels, {backend} {str(dtype).removeprefix('torch.')}"
    began = time.perf_counter()
    try:
        worst = {operation: _errors(operation, backend, dtype, device) for operation in OPERATIONS}
    except Exception as error:  # a kernel that does not launch is a finding
        return Check(name, False, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    limits = LIMITS[dtype]
    passed = all(error <= limit for errors in worst.values() for error, limit in zip(errors, limits, strict=True))
    shown = ", ".join(f"{operation} {errors[0]:.0e} / {errors[1]:.0e}" for operation, errors in worst.items())
    return Check(name, passed, f"error of outputs / gradients: {shown} (limits {limits[0]:g} / {limits[1]:g}), "
                               f"{time.perf_counter() - began:.1f} s")


def _errors(operation: str, backend: str, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """(error of the output, the largest of any gradient) against the reference on the same numbers."""
    run, make = OPERATIONS[operation]
    inputs = {name: x if operation == "attention" and name not in "qkv" else x.to(dtype) for name, x in make().items()}
    exact = {name: x.double().requires_grad_() for name, x in inputs.items()}
    y = run(**exact, backend="reference")
    # noise and the output itself, in numbers bf16 can hold: of noise alone the gradients of gate and sink are sums
    # whose terms cancel, and show nothing but rounding
    dy = (torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) + y.detach()).to(torch.bfloat16)
    expected = torch.autograd.grad(y, list(exact.values()), dy.to(y.dtype))
    tried = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    found_y = run(**tried, backend=backend)
    found = torch.autograd.grad(found_y, list(tried.values()), dy.to(found_y))
    errors = [relative_error(x.cpu(), wanted) for x, wanted in zip(found, expected, strict=True)]
    worst = max(errors, key=lambda error: float("inf") if error != error else error)  # a NaN is the worst
    return relative_error(found_y.cpu(), y), worst


def _attention_inputs() -> dict[str, Tensor]:
    """130 tokens in blocks of 64. All earlier tokens stay cached: rounding of scores changes no choice.

    Only q, k and v are tried in 16 bits: the rest is float32 in a bf16 model as well.
    """
    normal, heads, width = torch.Generator().manual_seed(0), 2, 64

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=normal)

    return {"q": draw(1, 130, heads, width), "k": draw(1, 130, heads, width), "v": draw(1, 130, heads, width),
            "log_decay": -draw(1, 130, heads).exp() / 20, "beta": draw(1, 130, heads).sigmoid(),
            "gamma_q": 1 + draw(width) / 10, "gamma_k": 1 + draw(width) / 10, "gate": draw(heads), "sink": draw(heads)}


def _conv_inputs() -> dict[str, Tensor]:
    normal = torch.Generator().manual_seed(0)
    return {"x": torch.randn(1, 130, 64, generator=normal), "weight": torch.randn(64, 4, generator=normal) / 2}


def _norm_inputs() -> dict[str, Tensor]:
    normal = torch.Generator().manual_seed(0)
    return {"x": torch.randn(130, 64, generator=normal), "gate": torch.randn(130, 64, generator=normal),
            "weight": 1 + torch.randn(64, generator=normal) / 10}


def _gate_inputs() -> dict[str, Tensor]:
    normal = torch.Generator().manual_seed(0)
    return {"x": torch.randn(130, 8, generator=normal), "A_log": torch.randn(4, generator=normal),
            "dt_bias": torch.randn(4, generator=normal)}


def _gates(**arguments: Tensor) -> Tensor:
    return torch.cat(decay_and_strength(**arguments, heads=4), -1)


def _attention(**arguments: Tensor) -> Tensor:
    return hola_attention(**arguments, block=64, slots=128)


OPERATIONS = {"attention": (_attention, _attention_inputs), "convolution": (short_conv, _conv_inputs),
              "output norm": (gated_rms_norm, _norm_inputs), "gates": (_gates, _gate_inputs)}


def collective_check(device: torch.device) -> Check:
    """An all-reduce over all processes that the launcher started: right, and how fast. Every rank calls it."""
    name = "collectives"
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return Check(name, True, "one process, nothing to try; start it as python -m hola_megatron.launch "
                                 "--nproc-per-node N tools/doctor.py")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend)
    megabytes = 256 if device.type == "cuda" else 16
    x = torch.full((megabytes * 2**18,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(x)
    right = bool((x == ranks * (ranks + 1) / 2).all())
    seconds = _time_all_reduce(x, 5)
    moved = 2 * (ranks - 1) / ranks * x.nbytes / seconds / 1e9
    dist.destroy_process_group()
    return Check(name, right, f"all-reduce of {megabytes} MiB over {ranks} ranks ({backend}): "
                              f"{'right' if right else 'WRONG SUM'}, {1e3 * seconds:.2f} ms, {moved:.1f} GB/s a rank")


def _time_all_reduce(x: Tensor, repeats: int) -> float:
    """Seconds of one, after one more warm-up."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        _wait(x)
        began = time.perf_counter()
        dist.all_reduce(x)
        _wait(x)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2]


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def disk_check(folder: Path) -> Check:
    """Free disk space for run folders, and the speed of writing and syncing a file there."""
    at = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(at).free / 1e9
    try:
        seconds = _time_write(at)
    except OSError as error:
        return Check("disk", False, f"{at} cannot be written ({error.strerror})")
    speed = DISK_BYTES / seconds / 1e6
    return Check("disk", True, f"{folder}: {free:,.0f} GB free, {speed:,.0f} MB/s written and synced")


def _time_write(folder: Path) -> float:
    data = os.urandom(DISK_BYTES)
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began
