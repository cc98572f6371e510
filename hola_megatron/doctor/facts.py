"""What is installed: versions from package metadata, devices from torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "torchvision", "triton", "megatron-core", "transformer-engine", "transformer-engine-cu12",
            "transformer-engine-cu13", "transformer-engine-torch", "apex", "mosaicml-streaming", "transformers",
            "deepspeed", "numpy", "nvidia-cudnn-frontend", "nvidia-cublas", "nvidia-cublas-cu12")


@dataclass(frozen=True)
class Facts:
    """packages: installed version by distribution name. capability: of the first GPU, None without one.

    apex_optimizers: whether the importable `apex` is NVIDIA's; None without any `apex`. gpu_file: the kernel driver
    shows a device, whatever torch makes of it.
    """

    python: tuple[int, int]
    packages: dict[str, str]
    cuda: str | None = None
    cudnn: str | None = None
    nccl: str | None = None
    devices: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None
    apex_optimizers: bool | None = None
    gpu_file: bool = False
    load_errors: dict[str, str] = field(default_factory=dict)

    def version(self, package: str) -> tuple[int, ...] | None:
        """(2, 20, 2) of "2.20.2+cu13"; None where it is not installed."""
        text = self.packages.get(package)
        return numbers_of(text) if text else None

    @property
    def cublas(self) -> tuple[int, ...] | None:
        return self.version("nvidia-cublas") or self.version("nvidia-cublas-cu12")


def numbers_of(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "3.6.0+git1" -> (3, 6, 0)."""
    return tuple(int(number) for number in re.match(r"[\d.]*", version).group().strip(".").split(".") if number)


def gather_facts() -> Facts:
    """Of this process and machine. Imports torch, and Transformer Engine where it is installed."""
    import torch

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    packages["torch"] = torch.__version__  # metadata may lack +cpu or +cu130
    load_errors = _load_errors(packages)  # before torch loads its cuDNN: as in training, two of them may not mix
    try:
        cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    except RuntimeError as error:
        cudnn, load_errors["cudnn"] = None, problem_of(error)
    usable = torch.cuda.is_available()
    nccl = torch.cuda.nccl.version() if usable and torch.distributed.is_nccl_available() else None
    return Facts(
        python=(int(platform.python_version_tuple()[0]), int(platform.python_version_tuple()[1])), packages=packages,
        cuda=torch.version.cuda, cudnn=None if cudnn is None else str(cudnn),
        nccl=_package_of("nvidia-nccl-") if nccl is None else ".".join(map(str, nccl)),
        devices=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if usable else (),
        capability=torch.cuda.get_device_capability() if usable else None, apex_optimizers=_apex_optimizers(),
        gpu_file=os.path.exists("/dev/nvidia0"), load_errors=load_errors)


def _package_of(prefix: str) -> str | None:
    """The version of the first installed distribution so named: NCCL's wheel says which CUDA it is for."""
    for name in (f"{prefix}cu13", f"{prefix}cu12"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _apex_optimizers() -> bool | None:
    """Whether `apex` has optimizers; found by its files, because importing a wrong one runs its code."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    return any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or ())


def _load_errors(packages: dict[str, str]) -> dict[str, str]:
    """Why an installed Transformer Engine cannot be imported: Megatron silently runs without it, or fails."""
    if "transformer-engine" not in packages:
        return {}
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # whatever it is, it is the finding
        return {"transformer-engine": problem_of(error)}
    return {}


def problem_of(error: Exception) -> str:
    """One line: the error's type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
