"""Console output: the step line, and formats of values."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import psutil
import torch

import hola_megatron


def short(number: float) -> str:
    """1310000 -> 1.31M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """9660 -> 2h41m."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s"


def rate(value: float) -> str:
    """4e-4 as 4.0e-4."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def step_line(row: dict[str, Any], steps: int, memory_total: float) -> str:
    """One line: `step 4,000/28,610 14.0% | loss 2.9131 | gnorm 0.410 | lr 3.9e-4 | 1.31M tok/s | MFU 38.2% | ...`."""
    mfu = "MFU n/a" if row["mfu"] is None else f"MFU {100 * row['mfu']:.1f}%"
    return " | ".join([
        f"step {row['step']:,}/{steps:,} {100 * row['step'] / steps:.1f}%", f"loss {row['loss']:.4f}",
        f"gnorm {row['grad_norm']:.3f}", f"lr {rate(row['learning_rate'])}",
        f"{short(row['tokens_per_second'])} tok/s", mfu,
        f"mem {row['memory_gb']:.1f}/{memory_total:.0f} GB", f"eta {duration(row['eta_seconds'])}"])


def memory_gb(device: torch.device) -> tuple[float, float]:
    """(peak used, total) GB of 10^9 bytes: of the GPU, or of this process on a machine without one."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 1e9, total / 1e9
    return psutil.Process().memory_info().rss / 1e9, psutil.virtual_memory().total / 1e9


def device_name(device: torch.device) -> str:
    """The GPU's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def code_version() -> str:
    """Package version and, in a git checkout, the commit and whether there are uncommitted changes."""
    here = os.path.dirname(os.path.abspath(hola_megatron.__file__))

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "--short=10", "HEAD")
    if not commit:
        return hola_megatron.__version__
    return f"{hola_megatron.__version__} commit {commit}{' (changed)' if git('status', '--porcelain') else ''}"
