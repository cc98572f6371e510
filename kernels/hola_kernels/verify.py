"""python -m hola_kernels.verify [word ...] [--jobs N]: every Triton kernel on this GPU against float64, as a table.

Each operation brings a module `verify_cases` with
    cases() -> [(name, run)]   run() -> {output: relative error}; a NaN is a failure
    limit(name, output)        the largest error that passes
Words select the cases whose names hold them all. Exit code 1 when any case fails, 2 without a usable GPU or case.
"""

from __future__ import annotations

import argparse
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
from hola_kernels.verify_jobs import in_processes, visible_gpus

OPERATIONS = ("gated_delta", "exact_cache", "short_conv", "gated_norm", "gates", "rms_norm", "swiglu", "cross_entropy")
Case = tuple[str, Callable[[], dict[str, float]]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m hola_kernels.verify", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only the cases whose names hold all of them")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="processes, over all visible GPUs (most of the time goes into compiling); default 1")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: {options.jobs} must be at least 1")
    problem = triton_problem("cuda") if torch.cuda.is_available() else "no CUDA device"
    if problem:
        print(f"nothing to verify here: {problem}; without a GPU `pytest tests/kernels` interprets the kernels",
              file=sys.stderr)
        return 2
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n")
    print("| case | worst error | of its limit | seconds | |\n|---|---|---|---|---|")
    chosen = [(module.__name__, name) for module in case_modules() for name, _ in module.cases()
              if all(word in name for word in options.words)]
    rows = in_processes(chosen, options.jobs, visible_gpus()) if options.jobs > 1 else rows_of(chosen)
    failed = 0
    for text, passed in rows:
        print(text, flush=True)
        failed += not passed
    if not chosen:
        print(f"no case's name holds {' and '.join(options.words)}", file=sys.stderr)
        return 2
    print(f"\n{len(chosen) - failed} of {len(chosen)} cases pass")
    return 1 if failed else 0


def case_modules() -> list[ModuleType]:
    """The verify_cases modules that exist; the first are those of the whole hola_attention and of one decoded token."""
    names = ["hola_kernels.verify_cases", "hola_kernels.step_verify_cases",
             *(f"hola_kernels.{operation}.verify_cases" for operation in OPERATIONS)]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def rows_of(chosen: list[tuple[str, str]]) -> Iterator[tuple[str, bool]]:
    """(row of the table, passed) of every (module, case) in `chosen`, one after the other."""
    wanted = dict.fromkeys(module for module, _ in chosen)
    for module in map(importlib.import_module, wanted):
        names = {name for of, name in chosen if of == module.__name__}
        for name, run in module.cases():
            if name in names:
                yield _row(name, run, module.limit)


def _row(name: str, run: Callable[[], dict[str, float]], limit: Callable[[str, str], float]) -> tuple[str, bool]:
    begin = time.perf_counter()
    try:
        errors = run()
    except Exception as error:  # a kernel that does not launch is a row of the table, not the end of the sweep
        said = (str(error).splitlines() or [""])[0][:100]
        return f"| {name} | {type(error).__name__}: {said} | | | FAILED |", False
    share = {output: error / limit(name, output) for output, error in errors.items()}
    passed = all(part <= 1 for part in share.values())  # NaN compares false
    worst = max(share, key=lambda output: float("inf") if share[output] != share[output] else share[output])
    seconds, verdict = time.perf_counter() - begin, "" if passed else "FAILED"
    return f"| {name} | {worst} {errors[worst]:.1e} | {100 * share[worst]:.0f} % | {seconds:.1f} | {verdict} |", passed


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
