"""How fast a recipe trains on this machine, and where time and memory go.

    python tools/profile.py recipes/hola_340m.yaml [section.key=value ...] [--data] [--trace FILE] [--json FILE]
    python -m hola_megatron.launch --nproc-per-node 2 tools/profile.py recipes/hola_340m.yaml
    python tools/profile.py recipes/hola_1b.yaml --sweep train.micro_batch_size=4,8 --sweep train.recompute=none,full

Synthetic tokens by default; --data reads the recipe's own and tells the wait for them. Times whole optimizer steps
after a warm-up; prints tokens/s, MFU and HFU by the stated formula (hola_megatron/model/flops.py), peak memory by
phase and the time of every part, as Markdown. --sweep runs every combination of values in processes of its own (on
--ranks processes through hola_megatron.launch); one that runs out of memory is a row of the table.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import os
from pathlib import Path

from hola_megatron.arguments import Parser, count, positive
from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError, run_cli
from hola_megatron.paths import output_file, write_output


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=count, default=10, help="timed steps")
    parser.add_argument("--warmup", type=count, default=3,
                        help="steps before timing (kernels are compiled in the first)")
    parser.add_argument("--micro-batches", type=count, default=None,
                        help="micro-batches a rank makes for a step; default the recipe's (fewer is quicker to time)")
    parser.add_argument("--data", action="store_true", help="read the recipe's data instead of synthetic tokens")
    parser.add_argument("--trace", type=output_file("--trace"),
                        help="write a torch profiler trace of one step here")
    parser.add_argument("--json", type=output_file("--json"), default=None, help="write all numbers here")
    parser.add_argument("--markdown", type=output_file("--markdown"), default=None, help="write what is printed here")
    parser.add_argument("--sweep", action="append", metavar="section.key=value,value,...",
                        help="try these values; with several, every combination")
    parser.add_argument("--ranks", type=count, default=1, help="processes of each run of a sweep")
    parser.add_argument("--timeout", type=positive, default=900, help="seconds one run of a sweep may take")
    args = parser.parse_intermixed_args()
    _check(args)
    if args.sweep:
        sweep(args)
        return
    recipe = load_recipe(args.recipe, args.overrides)  # report mistakes before slow imports
    from hola_megatron.profile.profiler import ProfileOptions, profile_recipe
    from hola_megatron.startup.start import stop

    options = ProfileOptions(steps=args.steps, warmup=args.warmup, micro_batches=args.micro_batches,
                             real_data=args.data, trace=args.trace, json_path=args.json, markdown_path=args.markdown)
    profile_recipe(recipe, options)
    stop()


def sweep(args: argparse.Namespace) -> None:
    from hola_megatron.profile.sweep import combinations, run_sweep, sweep_json, sweep_table

    settings = combinations(args.sweep)
    load_recipe(args.recipe, args.overrides)  # report mistakes that do not depend on the combination at once
    arguments = [str(args.recipe), *args.overrides, "--steps", str(args.steps), "--warmup", str(args.warmup)]
    arguments += ["--micro-batches", str(args.micro_batches)] if args.micro_batches else []
    arguments += ["--data"] if args.data else []
    rows = run_sweep(Path(__file__), arguments, settings, ranks=args.ranks, timeout_s=args.timeout,
                     log=lambda line: print(line, flush=True))
    text = sweep_table(rows)
    print(f"\n{text}", flush=True)
    if args.json:
        write_output("--json", args.json, sweep_json(rows))
    if args.markdown:
        write_output("--markdown", args.markdown, text + "\n")


def _check(args: argparse.Namespace) -> None:
    problems = [f"--{name}: {value} must be at least {least}"
                for name, value, least in (("steps", args.steps, 1), ("warmup", args.warmup, 1),
                                           ("micro-batches", args.micro_batches, 1), ("ranks", args.ranks, 1))
                if value is not None and value < least]
    if args.timeout <= 0:
        problems.append(f"--timeout: {args.timeout} must be above 0")
    if args.sweep and args.trace:
        problems.append("--trace: a sweep has no one trace; profile the combination you want to see")
    if args.sweep and "RANK" in os.environ:
        problems.append("--sweep: starts processes itself; run it without a launcher, with --ranks")
    if not args.sweep and args.ranks > 1:
        problems.append("--ranks: is for --sweep; else start `python -m hola_megatron.launch --nproc-per-node "
                        f"{args.ranks} tools/profile.py ...`")
    if problems:
        raise RecipeError(problems)


if __name__ == "__main__":
    run_cli(main)
