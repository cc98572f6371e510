"""The training program with one fault built in, for tests: python tests/train/faults.py FAULT RECIPE ...

FAULT is kind@step[@rank]: nan_loss, nan_gradient, nan_weight, nan_after (a weight, once updated),
inf_moment (of the optimizer, after its update),
noise (random tokens), hang, late (hangs for a while), die, stopped, slow (than all others),
interrupt, ctrl_c, hangup (signals that ask for the end), moved, removed (the run folder).
`install` does the same inside a test's own process.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import dataclasses
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from hola_megatron.engine import forward
from hola_megatron.engine.base import Engine
from hola_megatron.engine.megatron import MegatronEngine
from hola_megatron.errors import run_cli

LATE_SECONDS = 25
original_step = Engine.train_step
original_finalize = MegatronEngine._finalize
original_sum = forward._masked_sum


class Fault:
    """Acts on chosen calls of train_step (1 is the first of this process) on one rank, or on all."""

    def __init__(self, kind: str, steps: Callable[[int], bool], rank: int | None = None):
        self.kind, self.steps, self.rank, self.calls, self.now = kind, steps, rank, 0, False
        self.work_began = self.step_ended = time.monotonic()

    def train_step(self, engine: Engine, batches: list[Any], *args: Any) -> Any:
        self.calls += 1
        self.work_began = self.step_ended  # waiting for data counts as a rank's own time
        self.now = self.steps(self.calls) and self.rank in (None, engine.layout.rank)
        if self.now and hasattr(self, self.kind):
            batches = getattr(self, self.kind)(engine, batches) or batches
        hook = _weight(engine).register_hook(self.spoil) if self.kind == "nan_gradient" else None
        result = original_step(engine, batches, *args)
        self.step_ended = time.monotonic()
        if hook:
            hook.remove()
        if self.now and self.kind == "nan_after":
            with torch.no_grad():
                _weight(engine)[0, 0] = torch.nan
        if self.now and self.kind == "inf_moment":
            engine.state._tensors(_weight(engine))["exp_avg_sq"].view(-1)[0] = torch.inf
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
        return total, tokens, seen

    def finalize(self, engine: Engine, *args: Any, **kwargs: Any) -> None:
        """slow: the others say how long their work of this step took; the slow rank then takes three times as long."""
        if self.kind == "slow":
            store, rank = dist.distributed_c10d._get_default_store(), engine.layout.rank
            if rank != self.rank:
                store.set(f"slow/{self.calls}/{rank}", str(time.monotonic() - self.work_began))
            elif self.now:
                others = [r for r in range(engine.layout.world) if r != rank]
                time.sleep(3 * max(float(store.get(f"slow/{self.calls}/{other}")) for other in others))
        original_finalize(engine, *args, **kwargs)

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

    def late(self, engine: Engine, batches: list[Any]) -> None:
        time.sleep(LATE_SECONDS)

    def die(self, engine: Engine, batches: list[Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def interrupt(self, engine: Engine, batches: list[Any]) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    def moved(self, engine: Engine, batches: list[Any]) -> None:
        folder = engine.recipe.folder
        folder.rename(folder.with_name(f"{folder.name}-moved"))

    def removed(self, engine: Engine, batches: list[Any]) -> None:
        shutil.rmtree(engine.recipe.folder)

    def ctrl_c(self, engine: Engine, batches: list[Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def hangup(self, engine: Engine, batches: list[Any]) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    def stopped(self, engine: Engine, batches: list[Any]) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


def _weight(engine: Engine) -> torch.nn.Parameter:
    return dict(engine.model[0].named_parameters())["module.decoder.layers.1.mlp.linear_fc1.weight"]


def install(fault: Fault, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    patch(Engine, "train_step", lambda engine, *args: fault.train_step(engine, *args))
    patch(forward, "_masked_sum", fault.masked_sum)
    patch(MegatronEngine, "_finalize", lambda engine, *args, **kwargs: fault.finalize(engine, *args, **kwargs))


def install_named(text: str) -> None:
    """FAULT as above."""
    kind, step, *rank = text.split("@")
    first = int(step.rstrip("+"))
    install(Fault(kind, (lambda n: n >= first) if step.endswith("+") else (lambda n: n == first),
                  int(rank[0]) if rank else None))


if __name__ == "__main__":
    install_named(sys.argv.pop(1))
    from hola_megatron.train.__main__ import main

    run_cli(main)
