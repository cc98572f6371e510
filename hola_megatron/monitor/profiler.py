"""Timing a recipe: steps after warm-up, memory by phase, GPU time by part. Behind tools/profile.py."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from hola_megatron.config import Recipe, data_ranks
from hola_megatron.config import micro_batches as recipe_micro_batches
from hola_megatron.data.stream import Batch, BatchLoader
from hola_megatron.errors import RecipeError
from hola_megatron.model.flops import executed_flops_per_token, flops_per_token, peak_flops
from hola_megatron.monitor.console import code_version, device_name, memory_gb, short
from hola_megatron.parallel.groups import Layout, start

# first match wins: (part, what a GPU kernel's name contains)
PARTS = (
    ("communication", ("nccl",)),
    ("exact read and selection", ("select", "read", "query_gradient", "key_gradient", "pair_gradient", "top_slots",
                                  "inverse_norm", "delta_kernel")),
    ("state", ("walk", "prepare", "recompute", "chunk_grad", "states")),
    ("short convolution", ("conv", "strip")),
    ("output norm", ("gated",)),
    ("norms", ("rms_norm", "rmsnorm", "layer_norm", "layernorm")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "matmul", "xmma")),
    ("optimizer", ("adam", "multi_tensor", "lpnorm")),
    ("softmax attention", ("flash", "fmha", "attention")),
    ("copies", ("memcpy", "memset", "copy")),
)


def profile_recipe(recipe: Recipe, *, steps: int, warmup: int, micro_batches: int | None, real_data: bool,
                   trace: Path | None, json_path: Path | None) -> dict[str, Any]:
    """Time `steps` optimizer steps; rank 0 prints and returns the numbers."""
    world_steps = micro_batches
    if micro_batches is not None:
        recipe = _with_micro_batches(recipe, micro_batches)
    layout = start(recipe)
    peak = peak_flops(device_name(layout.device), recipe.log.peak_tflops)
    if layout.device.type == "cuda" and peak is None:
        raise RecipeError(f"log.peak_tflops: the peak of {device_name(layout.device)} is not known; give its dense "
                          "bf16 TFLOP/s, MFU is never guessed")
    from hola_megatron.engine.megatron import MegatronEngine

    began = time.perf_counter()
    engine = MegatronEngine(recipe, layout)
    built = time.perf_counter() - began
    batches = _batches(recipe, layout, real_data)
    times, first = _time_steps(engine, batches, recipe, warmup, steps)
    median = statistics.median(times)
    tokens = recipe.tokens_per_step
    speed = tokens / median
    numbers = {
        "recipe": recipe.name, "device": device_name(layout.device), "ranks": layout.world, "layout": layout.describe(),
        "code": code_version(), "torch": torch.__version__, "adam": engine.adam,
        "micro_batches": world_steps or recipe_micro_batches(recipe, layout.world),
        "micro_batch_size": recipe.train.micro_batch_size, "sequence_length": recipe.train.sequence_length,
        "ms_per_step": 1e3 * median, "ms_fastest": 1e3 * min(times), "ms_slowest": 1e3 * max(times),
        "tokens_per_second": speed, "tokens_per_second_per_rank": speed / layout.world,
        "first_step_s": first, "build_s": built, "memory_gb": memory_gb(layout.device)[0],
        "flops_per_token": flops_per_token(recipe.model, recipe.train.sequence_length)}
    if peak:
        numbers["mfu"] = speed * numbers["flops_per_token"] / (peak * layout.world)
        numbers["hfu"] = speed * executed_flops_per_token(recipe) / (peak * layout.world)
        numbers["peak_tflops"] = peak / 1e12
    if layout.device.type == "cuda":
        numbers["share"] = _share_by_part(engine, batches, recipe, trace)
    if layout.is_main:
        _print(numbers)
        if json_path:
            json_path.write_text(json.dumps(numbers, indent=1))
    return numbers


def _with_micro_batches(recipe: Recipe, count: int) -> Recipe:
    import os

    ranks = data_ranks(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    train = dataclasses.replace(recipe.train, global_batch_size=count * recipe.train.micro_batch_size * max(ranks, 1))
    return dataclasses.replace(recipe, train=train)


def _batches(recipe: Recipe, layout: Layout, real_data: bool) -> list[Batch]:
    """The micro-batches of one step, used again and again."""
    count, size, length = recipe_micro_batches(recipe, layout.world), recipe.train.micro_batch_size, \
        recipe.train.sequence_length
    if real_data:
        from hola_megatron.trainer import open_data

        loader = BatchLoader(open_data(recipe).mixture, data_rank=layout.data_rank, data_size=layout.data,
                             micro_batch_size=size, micro_batches=count, documents=recipe.data.documents)
        return next(loader)
    generator = torch.Generator().manual_seed(layout.data_rank)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, recipe.model.vocab_size, (size, length + 1), generator=generator)
        cuts = torch.arange(0, size * length + 1, length, dtype=torch.int32)
        batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(size, length),
                             cuts if recipe.data.documents == "separate" else None))
    return batches


def _time_steps(engine: Any, batches: list[Batch], recipe: Recipe, warmup: int,
                steps: int) -> tuple[list[float], float]:
    """Seconds of each timed step, and of the very first one (which compiles kernels)."""
    times = []
    for _ in range(warmup + steps):
        _sync(engine.layout)
        began = time.perf_counter()
        engine.train_step(batches, recipe.train.learning_rate)
        _sync(engine.layout)
        times.append(time.perf_counter() - began)
    return times[warmup:], times[0]


def _sync(layout: Layout) -> None:
    if layout.device.type == "cuda":
        torch.cuda.synchronize()


def _share_by_part(engine: Any, batches: list[Batch], recipe: Recipe, trace: Path | None) -> dict[str, float]:
    """GPU milliseconds of one step by part, largest first, and "idle": time no kernel ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        engine.train_step(batches, recipe.train.learning_rate)
        _sync(engine.layout)
        wall = 1e3 * (time.perf_counter() - began)
    if trace and engine.layout.is_main:
        profiler.export_chrome_trace(str(trace))
    parts: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            milliseconds = event.time_range.elapsed_us() / 1e3
            parts[part_of(event.name)] += milliseconds
            names[event.name] += milliseconds
    parts["idle"] = max(wall - sum(parts.values()), 0.0)
    top = sorted(names.items(), key=lambda item: -item[1])[:32]
    return {**dict(sorted(parts.items(), key=lambda item: -item[1])),
            **{f"kernel: {name[:70]}": value for name, value in top}}


def part_of(kernel: str) -> str:
    """The part a GPU kernel's name belongs to; "elementwise and other" where none fits."""
    lower = kernel.lower()
    for part, marks in PARTS:
        if any(mark in lower for mark in marks):
            return part
    return "elementwise and other"


def _print(numbers: dict[str, Any]) -> None:
    n = numbers
    print(f"\n{n['recipe']} on {n['ranks']} x {n['device']}; {n['code']}, torch {n['torch']}")
    print(f"{n['micro_batches']} micro-batches of {n['micro_batch_size']} x {n['sequence_length']} tokens")
    rates = [f"{short(numbers['tokens_per_second'])} tok/s", f"{numbers['ms_per_step']:.1f} ms a step"]
    if "mfu" in numbers:
        rates += [f"MFU {100 * n['mfu']:.1f}%", f"HFU {100 * n['hfu']:.1f}% of {n['peak_tflops']:.0f} TFLOP/s"]
    rates += [f"peak {numbers['memory_gb']:.1f} GB", f"first step {numbers['first_step_s']:.1f} s"]
    print(" | ".join(rates))
    for part, milliseconds in numbers.get("share", {}).items():
        print(f"{milliseconds:10.2f} ms  {part}")
