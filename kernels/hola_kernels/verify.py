"""python -m hola_kernels.verify [word ...]: every Triton kernel on this GPU against float64, as a table.

Each operation brings a module `verify_cases` with
    cases() -> [(name, run)]   run() -> {output: relative error}; a NaN is a failure
    limit(name, output)        the largest error that passes
Words select the cases whose names hold them all. Exit code 1 when any case fails, 2 without a usable GPU or case.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from hola_kernels.backend import triton_problem

OPERATIONS = ("gated_delta", "exact_cache", "short_conv", "gated_norm", "gates", "rms_norm", "swiglu", "cross_entropy")
Case = tuple[str, Callable[[], dict[str, float]]]


def main(words: list[str]) -> int:
    problem = triton_problem("cuda") if torch.cuda.is_available() else "no CUDA device"
    if problem:
        print(f"nothing to verify here: {problem}; without a GPU `pytest tests/kernels` interprets the kernels",
              file=sys.stderr)
        return 2
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n")
    print("| case | worst error | of its limit | seconds | |\n|---|---|---|---|---|")
    failed = total = 0
    for module in case_modules():
        for name, run in module.cases():
            if all(word in name for word in words):
                total += 1
                failed += not _report(name, run, module.limit)
    if not total:
        print(f"no case's name holds {' and '.join(words)}", file=sys.stderr)
        return 2
    print(f"\n{total - failed} of {total} cases pass")
    return 1 if failed else 0


def case_modules() -> list[ModuleType]:
    """The verify_cases modules that exist; the first are those of the whole hola_attention and of one decoded token."""
    names = ["hola_kernels.verify_cases", "hola_kernels.step_verify_cases",
             *(f"hola_kernels.{operation}.verify_cases" for operation in OPERATIONS)]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def _report(name: str, run: Callable[[], dict[str, float]], limit: Callable[[str, str], float]) -> bool:
    """Print one row of the table; True when every error is within its limit."""
    begin = time.perf_counter()
    try:
        errors = run()
    except Exception as error:  # a kernel that does not launch is a row of the table, not the end of the sweep
        print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:100]} | | | FAILED |", flush=True)
        return False
    share = {output: error / limit(name, output) for output, error in errors.items()}
    passed = all(part <= 1 for part in share.values())  # NaN compares false
    worst = max(share, key=lambda output: float("inf") if share[output] != share[output] else share[output])
    print(f"| {name} | {worst} {errors[worst]:.1e} | {100 * share[worst]:.0f} % | {time.perf_counter() - begin:.1f} | "
          f"{'' if passed else 'FAILED'} |", flush=True)
    return passed


def relative_error(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected; NaN where anything is."""
    scale = expected.detach().double().norm().clamp_min(1e-30)
    return float((found.detach().double() - expected.detach().double()).norm() / scale)


@contextmanager
def poisoned() -> Iterator[None]:
    """Every new uninitialised tensor holds NaN (floats) or -1 (integers): what is never written shows."""
    makers = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in makers]

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: object, **options: object) -> Tensor:
            made = make(*arguments, **options)
            return made.fill_(float("nan") if made.is_floating_point() else -1)
        return call

    for (owner, name), original in zip(makers, originals, strict=True):
        setattr(owner, name, filled(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(makers, originals, strict=True):
            setattr(owner, name, original)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
