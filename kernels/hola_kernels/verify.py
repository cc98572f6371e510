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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from hola_kernels.backend import triton_problem
from hola_kernels.verify_jobs import in_processes, visible_gpus
from hola_kernels.verify_rows import rows_of

OPERATIONS = ("gated_delta", "exact_cache", "kept_attention", "short_conv", "gated_norm", "gates", "rms_norm", "swiglu",
              "cross_entropy", "rotary", "softmax_attention", "merge")
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
        print(f"nothing to verify here: {problem}; without a GPU `TRITON_INTERPRET=1 pytest tests/kernels` interprets "
              "the kernels", file=sys.stderr)
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


def relative_error(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected; NaN where anything is."""
    scale = expected.detach().double().norm().clamp_min(1e-30)
    return float((found.detach().double() - expected.detach().double()).norm() / scale)


def against_float64(run: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor],
                    gradients: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(found, expected): the outputs of run(backend, **inputs) and the gradients of all inputs; found by the triton
    backend with new tensors poisoned, expected by the torch backend in float64. gradients: of the first outputs."""
    def results(backend: str, leaves: dict[str, Tensor], incoming: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = run(backend, **leaves)
        return *outputs, *torch.autograd.grad(outputs[: len(incoming)], list(leaves.values()), incoming)

    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    with poisoned():
        found = results("triton", leaves, gradients)
    return found, results("torch", exact, [dy.double() for dy in gradients])


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
