"""What watching over a run costs: the share of its wall time spent in each watching part. Prints a Markdown table.

    python tests/train/measure_cost.py recipes/hola_tiny.yaml train.steps=60 run_dir=/tmp/cost checkpoint.every=20
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import functools
import sys
import time
from collections import defaultdict
from typing import Any

from hola_megatron.config import load_recipe
from hola_megatron.control.guard import NumberGuard
from hola_megatron.control.watchdog import Watchdog
from hola_megatron.log.stragglers import Stragglers
from hola_megatron.startup.start import stop
from hola_megatron.train import loop as trainer
from hola_megatron.train.checkpoint_schedule import CheckpointSchedule

SPENT: dict[str, float] = defaultdict(float)
CALLS: dict[str, int] = defaultdict(int)


def timed(owner: Any, name: str, label: str) -> None:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            SPENT[label] += time.perf_counter() - began
            CALLS[label] += 1
    setattr(owner, name, outer)


if __name__ == "__main__":
    timed(NumberGuard, "judge", "guard: judging loss and gradient norm")
    timed(NumberGuard, "accept", "guard: keeping the window")
    timed(trainer, "all_reduce_max", "agreeing on signals and saves (one collective)")
    timed(Watchdog, "mark", "watchdog: marking progress")
    timed(Watchdog, "_beat", "watchdog: telling the store (its own thread)")
    timed(Stragglers, "add", "stragglers: adding up")
    timed(Stragglers, "report", "stragglers: comparing")
    timed(CheckpointSchedule, "begin", "checkpoint: copying the state")
    timed(trainer.Run, "step", "the steps themselves")
    trainer.train(load_recipe(sys.argv[1], sys.argv[2:]), new=True)
    stop()
    steps = SPENT.pop("the steps themselves")
    print(f"\n{CALLS.pop('the steps themselves')} steps, {steps:.2f} s\n\n| part | calls | ms in all | share |\n"
          "| --- | --- | --- | --- |")
    for label, seconds in SPENT.items():
        print(f"| {label} | {CALLS[label]} | {1e3 * seconds:.2f} | {100 * seconds / steps:.3f} % |")
    print(f"| together | | {1e3 * sum(SPENT.values()):.2f} | {100 * sum(SPENT.values()) / steps:.3f} % |")
