"""What a share of exactly kept tokens costs: time and memory of whole steps of a model with ham layers.

    python tools/bench_ham.py recipes/ham_340m_share10.yaml train.micro_batch_size=32 [--shares 0 0.1 0.5 1]
    python tools/bench_ham.py recipes/ham_340m_share10.yaml train.micro_batch_size=4 train.sequence_length=16384

The routing scores are replaced by uniform random numbers and the thresholds by 1 - share, so every head keeps that
share of its tokens, at random places; all else is computed as in training. Random tokens, one process.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hola_kernels.ham
from hola_megatron.arguments import Parser, count, whole
from hola_megatron.config import Recipe, load_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.errors import RecipeError, run_cli
from hola_megatron.log.console import code_version, device_name
from hola_megatron.startup.start import start, stop

THRESHOLD = "controller.threshold"  # a layer that has it keeps what reaches it


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe with so many micro-batches a step."""
    recipe = load_recipe(options.recipe, options.overrides)
    size = recipe.train.micro_batch_size * options.micro_batches
    recipe = load_recipe(options.recipe, [*options.overrides, f"train.global_batch_size={size}"])
    if all(THRESHOLD not in kind.states(recipe.model) for kind in recipe.model.layer_kinds):
        raise RecipeError(f"model.pattern: {recipe.model.pattern} has no ham layer, whose share is what is varied")
    if any(not 0 <= share <= 1 for share in options.shares):
        raise RecipeError("--shares: must lie between 0 and 1")
    return recipe


def random_batch(recipe: Recipe, seed: int) -> Batch:
    size, length = recipe.train.micro_batch_size, recipe.train.sequence_length
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, recipe.model.vocab_size, (size, length + 1), generator=generator)
    bounds = torch.arange(0, size * length + 1, length) if recipe.data.documents == "separate" else None
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(size, length), bounds)


def uniform_scores(v: Tensor, residual: Tensor | None, route: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`routing_score` at its own cost, with other numbers."""
    score, log_weight = ROUTING_SCORE(v, residual, route)
    return torch.rand_like(score), log_weight


ROUTING_SCORE = hola_kernels.ham.routing_score


def step_seconds(engine: Any, batches: list[Batch], share: float) -> float:
    """Of one optimizer step at this share."""
    for chunk in engine.model:
        for module in chunk.modules():
            if hasattr(module, "controller"):
                module.controller.threshold.fill_(1 - share)
    began = synchronized()
    engine.train_step(batches, engine.recipe.train.learning_rate)
    return synchronized() - began


def synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--shares", nargs="+", type=float, default=[0, 0.05, 0.1, 0.25, 0.5, 1], metavar="SHARE")
    parser.add_argument("--micro-batches", type=count, default=2, help="of a step; default %(default)s")
    parser.add_argument("--steps", type=count, default=3, help="timed steps of every share; default %(default)s")
    parser.add_argument("--warmup", type=whole(0), default=2, help="steps before them; default %(default)s")
    options = parser.parse_intermixed_args()
    recipe = recipe_of(options)
    layout = start(recipe)
    from hola_megatron.engine.build import build_engine

    engine = build_engine(recipe, layout)
    batches = [random_batch(recipe, seed) for seed in range(options.micro_batches)]
    print(f"{recipe.name}: {options.micro_batches} micro-batches of {recipe.train.micro_batch_size} x "
          f"{recipe.train.sequence_length} tokens; {device_name(layout.device)}, torch {torch.__version__}, "
          f"{code_version()}\n\n| share | ms a step | tok/s | GB |\n| ---: | ---: | ---: | ---: |")
    on_gpu = layout.device.type == "cuda"
    with mock.patch.object(hola_kernels.ham, "routing_score", uniform_scores):
        step_seconds(engine, batches, 0.5)  # compiles
        for share in options.shares:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            times = [step_seconds(engine, batches, share) for _ in range(options.warmup + options.steps)]
            seconds = statistics.median(times[options.warmup:])
            peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if on_gpu else "-"
            print(f"| {share:g} | {1e3 * seconds:.0f} | {recipe.tokens_per_step / seconds:,.0f} | {peak} |", flush=True)
    stop()


if __name__ == "__main__":
    run_cli(main)
