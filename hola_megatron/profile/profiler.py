"""Timing a recipe: steps after warm-up, data wait, memory by phase, time by part. Implements tools/profile.py."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hola_megatron.data.stream import Batch, BatchLoader
from hola_megatron.errors import RecipeError, UserError
from hola_megatron.log.console import code_version, device_name, memory_gb
from hola_megatron.model.flops import executed_flops_per_token, flops_per_token, peak_flops
from hola_megatron.parallel.groups import Layout
from hola_megatron.paths import write_output
from hola_megatron.profile.memory_phases import MemoryPhases
from hola_megatron.profile.part_ranges import STEP, named_parts
from hola_megatron.profile.part_times import IDLE, PartTimes, Work, covered, part_times, read_trace
from hola_megatron.profile.profile_report import report
from hola_megatron.recipe.schema import Recipe
from hola_megatron.startup.start import compare_data, start

TOP_KERNELS = 24


class OutOfMemory(UserError):
    """A step does not fit on the device."""


@dataclass(frozen=True)
class ProfileOptions:
    """Options of tools/profile.py.

    micro_batches: a rank's for a step, None for the recipe's. parts: also trace a step for the time of its parts.
    """

    steps: int = 10
    warmup: int = 3
    micro_batches: int | None = None
    real_data: bool = False
    parts: bool = True
    trace: Path | None = None
    json_path: Path | None = None
    markdown_path: Path | None = None


def profile_recipe(recipe: Recipe, options: ProfileOptions) -> dict[str, Any]:
    """Time whole optimizer steps; rank 0 prints, writes and returns the numbers.

    Raises RecipeError where MFU's peak is not known, OutOfMemory (after noting it in the JSON file).
    """
    if options.micro_batches is not None:
        recipe = _with_micro_batches(recipe, options.micro_batches)
    layout = start(recipe)
    peak = peak_flops(device_name(layout.device), recipe.log.peak_tflops)
    if layout.device.type == "cuda" and peak is None:
        raise RecipeError(f"log.peak_tflops: the peak of {device_name(layout.device)} is not known; give its dense "
                          "bf16 TFLOP/s, MFU is never guessed")
    with _out_of_memory_told(recipe, options):
        numbers = _measure(recipe, layout, peak, options)
    if layout.is_main:
        text = report(numbers)
        print(f"\n{text}", flush=True)
        if options.markdown_path:
            write_output("--markdown", options.markdown_path, text + "\n")
        if options.json_path:
            write_output("--json", options.json_path, json.dumps(numbers, indent=1))
    return numbers


def _measure(recipe: Recipe, layout: Layout, peak: float | None, options: ProfileOptions) -> dict[str, Any]:
    from hola_megatron.engine.build import build_engine

    began = time.perf_counter()
    memory = MemoryPhases(layout.device)
    with memory.weights_noted():
        engine = build_engine(recipe, layout)
    built = time.perf_counter() - began
    feed = _feed(recipe, layout, options.real_data)
    seconds = _time_steps(engine, feed, recipe, options)
    numbers = _speed(recipe, layout, peak, seconds, options) | {
        "adam": engine.adam, "build_s": built, "first_step_s": seconds[0].total,
        "memory_gb": memory_gb(layout.device)[0]}
    busy = _busy_share(engine, feed, recipe) if options.parts and memory.measured else None
    engine.leave_graph()  # phases and parts cannot be measured inside a graph
    with memory.watched(engine):
        engine.train_step(feed(), recipe.train.learning_rate)
    numbers["memory"] = _most_over_ranks(memory.bytes, layout)
    if options.parts:
        numbers |= _parts(_trace_one_step(engine, feed, recipe, options), numbers, busy)
    return numbers


def _speed(recipe: Recipe, layout: Layout, peak: float | None, seconds: list[StepSeconds],
           options: ProfileOptions) -> dict[str, Any]:
    timed = seconds[options.warmup:]
    totals = [step.total for step in timed]
    median = statistics.median(totals)
    speed = recipe.tokens_per_step / median
    numbers = {
        "recipe": recipe.name, "device": device_name(layout.device), "ranks": layout.world, "layout": layout.describe(),
        "code": code_version(), "torch": torch.__version__, "data": "real" if options.real_data else "synthetic",
        "micro_batches": recipe.micro_batches(layout.world), "recompute": recipe.train.recompute,
        "micro_batch_size": recipe.train.micro_batch_size, "sequence_length": recipe.train.sequence_length,
        "cuda_graph": recipe.train.cuda_graph,
        "steps": options.steps, "ms_per_step": 1e3 * median, "ms_fastest": 1e3 * min(totals),
        "ms_slowest": 1e3 * max(totals), "tokens_per_second": speed, "tokens_per_second_per_rank": speed / layout.world,
        "flops_per_token": flops_per_token(recipe.model, recipe.train.sequence_length)}
    if options.real_data:
        numbers["data_wait_ms"] = 1e3 * statistics.median(step.waiting for step in timed)
    if peak:
        numbers["mfu"] = speed * numbers["flops_per_token"] / (peak * layout.world)
        numbers["hfu"] = speed * executed_flops_per_token(recipe) / (peak * layout.world)
        numbers["peak_tflops"] = peak / 1e12
    return numbers


def _with_micro_batches(recipe: Recipe, count: int) -> Recipe:
    ranks = recipe.data_ranks(int(os.environ.get("WORLD_SIZE", "1")))
    train = dataclasses.replace(recipe.train, global_batch_size=count * recipe.train.micro_batch_size * max(ranks, 1))
    return dataclasses.replace(recipe, train=train)


Feed = Callable[[], list[Batch]]


def _feed(recipe: Recipe, layout: Layout, real_data: bool) -> Feed:
    """Where a step's micro-batches come from: the recipe's loader, or the same random tokens again and again."""
    if not real_data:
        batches = _synthetic(recipe, layout)
        return lambda: batches
    from hola_megatron.data.opening import open_data

    data = open_data(recipe)
    compare_data(data)
    loader = BatchLoader(data.mixture, data_rank=layout.data_rank, data_size=layout.data,
                         micro_batch_size=recipe.train.micro_batch_size,
                         micro_batches=recipe.micro_batches(layout.world), documents=recipe.data.documents)
    return lambda: next(loader)


def _synthetic(recipe: Recipe, layout: Layout) -> list[Batch]:
    size, length = recipe.train.micro_batch_size, recipe.train.sequence_length
    generator = torch.Generator().manual_seed(layout.data_rank)
    batches = []
    for _ in range(recipe.micro_batches(layout.world)):
        tokens = torch.randint(0, recipe.model.vocab_size, (size, length + 1), generator=generator)
        cu_seqlens = torch.arange(0, size * length + 1, length)
        batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(size, length),
                             cu_seqlens if recipe.data.documents == "separate" else None))
    return batches


@dataclass(frozen=True)
class StepSeconds:
    """waiting: for the data; total: with it."""

    waiting: float
    total: float


def _time_steps(engine: Any, feed: Feed, recipe: Recipe, options: ProfileOptions) -> list[StepSeconds]:
    """Every step from the very first (which compiles kernels), the warm-up included."""
    seconds = []
    for _ in range(options.warmup + options.steps):
        _sync(engine.layout)
        began = time.perf_counter()
        batches = feed()
        waited = time.perf_counter() - began
        engine.train_step(batches, recipe.train.learning_rate)
        _sync(engine.layout)
        seconds.append(StepSeconds(waited, time.perf_counter() - began))
    return seconds


def _sync(layout: Layout) -> None:
    if layout.device.type == "cuda":
        torch.cuda.synchronize()


def _most_over_ranks(values: dict[str, int], layout: Layout) -> dict[str, float] | None:
    """GB of 10^9 bytes, each the largest of all ranks; None where it was not measured."""
    if not values:
        return None
    most = torch.tensor(list(values.values()), dtype=torch.int64, device=layout.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return {name: value / 1e9 for name, value in zip(values, most.tolist(), strict=True)}


def _busy_share(engine: Any, feed: Feed, recipe: Recipe) -> float:
    """Share of a step in which this rank's device does something, by a trace of the device alone.

    The full profiler slows launching, and a GPU at its power limit uses the pauses: its kernels run faster than they do
    in training. Tracing nothing but the device changes neither.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    batches = feed()
    engine.train_step(batches, recipe.train.learning_rate)  # as warm as in training
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        engine.train_step(batches, recipe.train.learning_rate)
        _sync(engine.layout)
        whole = 1e6 * (time.perf_counter() - began)
    spans = [(e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return min(covered(spans) / whole, 1.0)


def _trace_one_step(engine: Any, feed: Feed, recipe: Recipe, options: ProfileOptions) -> PartTimes | None:
    """One step under the profiler, on all ranks; rank 0 reads its trace."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if engine.layout.device.type == "cuda" else [])]
    batches = feed()
    with named_parts(engine), profile(activities=activities) as profiler, record_function(STEP):
        engine.train_step(batches, recipe.train.learning_rate)
        _sync(engine.layout)
    if not engine.layout.is_main:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = options.trace or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return part_times(read_trace(path))


def _parts(times: PartTimes | None, numbers: dict[str, Any], busy: float | None) -> dict[str, Any]:
    """Milliseconds by part. busy: of a step without the full profiler; None: what that saw is what there is."""
    if times is None:
        return {}
    share, waiting = dict(times.parts), numbers.get("data_wait_ms")
    found = {"hidden_communication_ms": times.hidden_communication, "profiled_step_ms": times.step,
             "kernels": _top(times.work)}
    if busy is not None:
        working = busy * (numbers["ms_per_step"] - (waiting or 0.0))
        found["stretched"] = working / times.busy
        share = {part: time * found["stretched"] for part, time in share.items()}
        share[IDLE] = numbers["ms_per_step"] - (waiting or 0.0) - working
    if waiting is not None:
        share["data wait"] = waiting
    return found | {"share": share}


def _top(work: list[Work]) -> list[dict[str, Any]]:
    together: dict[tuple[str, str], list[Work]] = defaultdict(list)
    for kernel in work:
        together[kernel.name, kernel.part].append(kernel)
    rows = [{"name": name, "part": part, "ms": sum(kernel.end - kernel.start for kernel in kernels) / 1e3,
             "calls": len({kernel.number for kernel in kernels})} for (name, part), kernels in together.items()]
    return sorted(rows, key=lambda row: -row["ms"])[:TOP_KERNELS]


@contextlib.contextmanager
def _out_of_memory_told(recipe: Recipe, options: ProfileOptions) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's own type, and those of CUDA and NCCL when memory is exhausted
        if "out of memory" not in str(error).lower():
            raise
        if options.json_path:
            options.json_path.write_text(json.dumps({"recipe": recipe.name, "out_of_memory": str(error)}))
        train = recipe.train
        raise OutOfMemory(
            f"train.micro_batch_size: {train.micro_batch_size} x {train.sequence_length} tokens do not fit on the "
            f"device with train.recompute={train.recompute}; make it smaller, or see tools/plan.py for a layout "
            "that fits") from None
