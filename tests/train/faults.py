"""The training program with one fault built in, for tests: python tests/train/faults.py FAULT RECIPE ...

FAULT is kind@step[@rank]: nan_loss, nan_gradient, nan_weight, nan_after (a weight, once updated),
noise (random tokens), hang, die, stopped, slow, interrupt (a signal that asks for the end).
`install` does the same inside a test's own process.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from hola_megatron.engine import base
from hola_megatron.engine.base import Engine
from hola_megatron.errors import run_cli

original_step = Engine.train_step
original_sum = base._masked_sum


class Fault:
    """Acts on chosen calls of train_step (1 is the first of this process) on one rank, or on all."""

    def __init__(self, kind: str, steps: Callable[[int], bool], rank: int | None = None):
        self.kind, self.steps, self.rank, self.calls, self.now = kind, steps, rank, 0, False

    def train_step(self, engine: Engine, batches: list[Any], *args: Any) -> Any:
        self.calls += 1
        self.now = self.steps(self.calls) and self.rank in (None, engine.layout.rank)
        if self.now and hasattr(self, self.kind):
            batches = getattr(self, self.kind)(engine, batches) or batches
        hook = _weight(engine).register_hook(self.spoil) if self.kind == "nan_gradient" else None
        result = original_step(engine, batches, *args)
        if hook:
            hook.remove()
        if self.now and self.kind == "nan_after":
            with torch.no_grad():
                _weight(engine)[0, 0] = torch.nan
        return result

    def spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        if self.now:
            gradient[0, 0] = torch.nan
        return gradient

    def masked_sum(self, *args: Any, **kwargs: Any) -> Any:
        total, tokens, seen = original_sum(*args, **kwargs)
        if self.now and self.kind == "nan_loss":
            total, seen = total * torch.nan, {"sums": seen["sums"] * torch.tensor([torch.nan, 1.0])}
        if self.now and self.kind == "slow":
            time.sleep(0.3)
        return total, tokens, seen

    def noise(self, engine: Engine, batches: list[Any]) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        return [dataclasses.replace(batch, **{name: torch.randint(
            0, 256, batch.tokens.shape, generator=generator) for name in ("tokens", "labels")}) for batch in batches]

    @torch.no_grad()
    def nan_weight(self, engine: Engine, batches: list[Any]) -> None:
        _weight(engine)[0, 0] = torch.nan

    def hang(self, engine: Engine, batches: list[Any]) -> None:
        while True:
            time.sleep(1000)

    def die(self, engine: Engine, batches: list[Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def interrupt(self, engine: Engine, batches: list[Any]) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    def stopped(self, engine: Engine, batches: list[Any]) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


def _weight(engine: Engine) -> torch.nn.Parameter:
    return dict(engine.model[0].named_parameters())["module.decoder.layers.1.mlp.linear_fc1.weight"]


def install(fault: Fault, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    patch(Engine, "train_step", lambda engine, *args: fault.train_step(engine, *args))
    patch(base, "_masked_sum", fault.masked_sum)


def install_named(text: str) -> None:
    """FAULT as above."""
    kind, step, *rank = text.split("@")
    first = int(step.rstrip("+"))
    install(Fault(kind, (lambda n: n >= first) if step.endswith("+") else (lambda n: n == first),
                  int(rank[0]) if rank else None))


if __name__ == "__main__":
    install_named(sys.argv.pop(1))
    from hola_megatron.train import main

    run_cli(main)
