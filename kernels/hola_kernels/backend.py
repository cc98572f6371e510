"""Which implementation runs, and why. Every choice is logged once."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

from hola_kernels.errors import KernelError

BACKENDS = ("reference", "torch", "triton")
logger = logging.getLogger("hola_kernels")


def choose_backend(backend: str, device: torch.device, refusal: str | None = None) -> str:
    """"auto" becomes the fastest backend that is right on this device; a named one is taken or refused.

    refusal: why the Triton kernels of the calling operation do not take these arguments (a head
    dimension, a dtype), or None. "auto" then runs torch and says so; backend="triton" raises KernelError.
    """
    if backend == "auto":
        backend, reason = auto_backend(device.type, device.index)
        if backend == "triton" and refusal:
            backend, reason = "torch", refusal
        _announce(backend, reason)
        return backend
    if backend not in BACKENDS:
        raise KernelError(f"backend: {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if backend == "triton" and (problem := triton_problem(device.type, device.index) or refusal):
        raise KernelError(f"backend: triton cannot run here ({problem}); use backend='torch' or 'auto'")
    return backend


def auto_backend(device_type: str, index: int | None = None) -> tuple[str, str]:
    """(backend, reason) that "auto" takes on "cpu" or "cuda" (GPU `index`, None: the current one)."""
    if device_type != "cuda":
        return "torch", f"device {device_type}"  # also under the interpreter: it is for tests, and slow
    problem = triton_problem(device_type, index)
    return ("torch", problem) if problem else ("triton", "CUDA device")


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, for tests: small tiles then, and precisions that it knows."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_problem(device_type: str, index: int | None = None) -> str | None:
    """Why the Triton backend cannot run on this kind of device (GPU `index`, None: the current one), or None.

    On "cpu" it can only under Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported).
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu":
        return None if interpreted() else "CPU without TRITON_INTERPRET=1"
    if device_type != "cuda":
        return f"device {device_type}"
    if torch.version.hip is not None:
        return "ROCm is not tested"
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"compute capability {major}.{minor}, 8.0 is needed"


@functools.cache
def _announce(backend: str, reason: str) -> None:
    logger.warning("hola_kernels: backend %s (%s)", backend, reason)
