"""Long sequences over GPUs: tokens a second, memory, and the overlap of every message of a step with other work.

    python tools/bench_context.py recipes/hola_340m.yaml --lengths 65536 --json one.json
    python -m hola_megatron.launch --nproc-per-node 4 tools/bench_context.py recipes/hola_340m.yaml \\
        --lengths 262144 1048576:full --base one.json

Every rank started holds one part of the sequence (parallel.context = ranks); one row of one document a step, random
tokens. A length may have a recompute mode after a colon. --base is the --json file of another run: its
tokens a second of one GPU are what rates are compared with. Whole optimizer steps are timed after warm-up; then one
more step is traced, for the table of overlaps (profile/overlap.py defines "hidden" and "transfer"). A length
that does not fit in memory is reported, and the next one runs.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hola_megatron.arguments import Parser, count, whole
from hola_megatron.config import Recipe, load_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.errors import RecipeError, run_cli
from hola_megatron.files import FileProblem, read_json, schemas
from hola_megatron.log.console import code_version, device_name
from hola_megatron.parallel.collectives import counted
from hola_megatron.parallel.groups import Layout
from hola_megatron.paths import local, output_file, write_output
from hola_megatron.profile.overlap import Overlap, overlaps, table
from hola_megatron.startup.start import start, stop


def recipe_of(options: argparse.Namespace, length: str) -> Recipe:
    """The recipe with one row of this many tokens, over all ranks."""
    tokens, _, recompute = length.partition(":")
    ranks = os.environ.get("WORLD_SIZE", "1")
    return load_recipe(options.recipe, [
        f"train.sequence_length={tokens}", "train.micro_batch_size=1", "train.global_batch_size=1",
        f"train.recompute={recompute or 'none'}", f"parallel.context={ranks}", *options.overrides])


def measure(recipe: Recipe, options: argparse.Namespace, layout: Layout) -> dict[str, Any]:
    """Times, memory and overlaps of one length; the same on every rank."""
    from hola_megatron.engine.megatron import MegatronEngine

    torch.cuda.reset_peak_memory_stats()
    engine = MegatronEngine(recipe, layout)
    batch = one_row(recipe)
    times = []
    for _ in range(options.warmup + options.steps):
        began = synchronized()
        result = engine.train_step([batch], recipe.train.learning_rate)
        times.append(synchronized() - began)
    seconds = statistics.median(times[options.warmup:])
    peak = gathered(torch.cuda.max_memory_allocated() / 1e9)
    found = gathered(traced(engine, batch, recipe))
    tokens = recipe.train.sequence_length
    return {"ranks": layout.world, "length": tokens, "recompute": recipe.train.recompute, "ms_per_step": 1e3 * seconds,
            "ms_all": [round(1e3 * t, 1) for t in times], "tokens_per_second_per_gpu": tokens / seconds / layout.world,
            "peak_gb": max(peak), "loss": result.loss, "grad_norm": result.grad_norm, "overlaps": found}


def one_row(recipe: Recipe) -> Batch:
    """One document of random tokens, the same on every rank."""
    length = recipe.train.sequence_length
    tokens = torch.randint(0, recipe.model.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, length]) if recipe.data.documents == "separate" else None
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(1, length), cu_seqlens)


def traced(engine: Any, batch: Batch, recipe: Recipe) -> list[Overlap]:
    """The overlap of this rank's messages of one step with other work."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, counted() as sent:
        engine.train_step([batch], recipe.train.learning_rate)
        synchronized()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        return overlaps(json.loads(Path(file.name).read_bytes())["traceEvents"], sent)


def synchronized() -> float:
    torch.cuda.synchronize()
    if dist.get_world_size() > 1:
        dist.barrier(device_ids=[torch.cuda.current_device()])
    return time.perf_counter()


def gathered(mine: Any) -> list[Any]:
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def try_length(length: str, options: argparse.Namespace) -> dict[str, Any]:
    recipe = recipe_of(options, length)
    layout = start(recipe)
    try:
        return measure(recipe, options, layout)
    except torch.OutOfMemoryError as error:
        return {"ranks": layout.world, "length": recipe.train.sequence_length, "problem": str(error).split(". ")[0]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def result_line(numbers: dict[str, Any], base: dict[str, Any] | None) -> str:
    """A line for one length, and its table of messages; base: the numbers of one GPU."""
    where = f"T {numbers['length']:,} on {numbers['ranks']} GPU{'s' * (numbers['ranks'] > 1)}"
    if "problem" in numbers:
        return f"{where}: does not fit ({numbers['problem']})"
    rate = numbers["tokens_per_second_per_gpu"]
    compared = same = ""
    if base:
        compared = f" | {100 * rate / base['tokens_per_second_per_gpu']:.1f} % of T {base['length']:,} on one GPU"
        if base["length"] == numbers["length"]:  # the same tokens, the same number of steps
            same = f" (one GPU: {base['loss']:.4f}, {base['grad_norm']:.3f})"
    line = (f"{where}, recompute {numbers['recompute']}: {rate:,.0f} tok/s a GPU{compared} | "
            f"{numbers['ms_per_step']:.1f} ms a step (all: {numbers['ms_all']}) | peak {numbers['peak_gb']:.1f} GB | "
            f"loss {numbers['loss']:.4f}, gnorm {numbers['grad_norm']:.3f}{same}")
    return line if numbers["ranks"] == 1 else f"{line}\n\n{table(numbers['overlaps'])}\n"


def read_base(path: Path) -> dict[str, Any]:
    """The first length of what --json wrote."""
    try:
        return read_json(path, schemas.CONTEXT_NUMBERS)[0]
    except FileProblem as problem:
        raise RecipeError(f"--base: {path}: {problem}; give what --json wrote of one GPU") from None


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--lengths", nargs="+", default=["65536"], metavar="TOKENS[:full]",
                        help="of the whole sequence")
    parser.add_argument("--steps", type=count, default=5, help="timed steps of every length")
    parser.add_argument("--warmup", type=whole(0), default=2, help="steps before timing")
    parser.add_argument("--json", type=output_file("--json"), default=None, help="write all numbers here")
    parser.add_argument("--base", type=local("--base"), default=None, help="what --json wrote of one GPU")
    options = parser.parse_intermixed_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    base = read_base(options.base) if options.base else None
    found = []
    for length in options.lengths:
        found.append(try_length(length, options))
        if dist.get_rank() == 0:
            print(result_line(found[-1], base), flush=True)
    if dist.get_rank() == 0:
        print(f"{device_name(torch.device('cuda'))}, torch {torch.__version__}, code {code_version()}", flush=True)
        if options.json:
            write_output("--json", options.json, json.dumps(
                [{n: x for n, x in numbers.items() if n != "overlaps"} for numbers in found], indent=1))
    stop()


if __name__ == "__main__":
    run_cli(main)
