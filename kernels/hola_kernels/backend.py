"""Which implementation runs, and why. Said once for every choice, never silently."""

from __future__ import annotations

import functools
import logging

import torch

from hola_kernels.errors import KernelError

BACKENDS = ("reference", "torch", "triton")
logger = logging.getLogger("hola_kernels")


def choose_backend(backend: str, device: torch.device) -> str:
    """"auto" becomes the fastest backend that is right on this device; a named one is taken or refused."""
    if backend == "auto":
        backend, reason = auto_backend(device.type)
        _announce(backend, reason)
        return backend
    if backend not in BACKENDS:
        raise KernelError(f"backend: {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if backend == "triton" and (problem := triton_problem(device.type)):
        raise KernelError(f"backend: triton cannot run here ({problem}); use backend='torch' or 'auto'")
    return backend


def auto_backend(device_type: str) -> tuple[str, str]:
    """(backend, reason) that "auto" takes on "cpu" or "cuda"."""
    problem = triton_problem(device_type)
    return ("torch", problem) if problem else ("triton", "CUDA device")


@functools.cache
def triton_problem(device_type: str) -> str | None:
    """Why the Triton backend cannot run on this kind of device, or None."""
    return "this version of hola_kernels has no Triton kernels"


@functools.cache
def _announce(backend: str, reason: str) -> None:
    logger.warning("hola_kernels: backend %s (%s)", backend, reason)
