"""Our training step compared with that of flash-linear-attention's Gated DeltaNet of equal shape, on one GPU.

    python tools/compare.py recipes/hola_340m.yaml [section.key=value ...] [--sides hola,gdn,fla-bf16,fla-fp32]

Sides: hola (the recipe), gdn (the recipe without exact cache), fla-bf16 (their model, bf16 weights), fla-fp32 (fp32
weights under bf16 autocast). Each runs in a process of its own with the same environment: the same micro-batches of
random tokens, forward, backward, clipping, Adam. Prints tokens/s, peak memory and the seconds of the first step. The
recipe's micro_batch_size is everybody's. flash-linear-attention and transformers are needed for their sides only.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hola_megatron.arguments import Parser, count, positive
from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError, run_cli
from hola_megatron.paths import output_file, write_output

SIDES = {"hola": "hola_megatron, the recipe", "gdn": "hola_megatron, without exact cache",
         "fla-bf16": "fla Gated DeltaNet, bf16 weights", "fla-fp32": "fla Gated DeltaNet, fp32 weights + autocast"}


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"which of {', '.join(SIDES)}; default all")
    parser.add_argument("--steps", type=count, default=10, help="timed steps")
    parser.add_argument("--warmup", type=count, default=3, help="steps before timing")
    parser.add_argument("--micro-batches", type=count, default=1, help="micro-batches of a step")
    parser.add_argument("--timeout", type=positive, default=900, help="seconds one side may take")
    parser.add_argument("--json", type=output_file("--json"), default=None, help="write all numbers here")
    parser.add_argument("--markdown", type=output_file("--markdown"), default=None, help="write the table here")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one side, in this very process
    args = parser.parse_intermixed_args()
    sides = [side for side in args.sides.split(",") if side]
    recipe = load_recipe(args.recipe, args.overrides)
    _check(args, sides)
    if any(side.startswith("fla") for side in sides):
        from hola_megatron.profile.rival import check_rival

        check_rival(recipe)
    if args.alone:
        time_side(sides[0], args)
        return 0
    rows = {side: run_side(side, args) for side in sides}
    text = table(rows)
    print(f"\n{text}", flush=True)
    if args.json:
        write_output("--json", args.json, json.dumps(rows, indent=1))
    if args.markdown:
        write_output("--markdown", args.markdown, text + "\n")
    return 1 if any("problem" in row for row in rows.values()) else 0


def run_side(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """A side in a process of its own: its numbers, or {"problem": ...}."""
    from hola_megatron.profile.sweep import outcome

    numbers, problem = outcome(
        [sys.executable, __file__, str(args.recipe), *args.overrides, "--sides", side, "--steps", str(args.steps),
         "--warmup", str(args.warmup), "--micro-batches", str(args.micro_batches), "--alone"], args.timeout)
    found = {"problem": problem} if numbers is None else numbers
    text = problem or f"{numbers['tokens_per_second']:,.0f} tok/s, first step {numbers['first_step_s']:.1f} s"
    print(f"{side}: {text}", flush=True)
    return found


def time_side(side: str, args: argparse.Namespace) -> None:
    """Time one side and write its numbers to --json."""
    from hola_megatron.profile.rival import compiled_before, versions

    about = {"compiled_before": compiled_before(), "versions": versions(), "micro_batches": args.micro_batches}
    recipe = load_recipe(args.recipe, [*args.overrides, *(["model.pattern=G"] if side == "gdn" else [])])
    about |= {"micro_batch_size": recipe.train.micro_batch_size, "sequence_length": recipe.train.sequence_length}
    if side.startswith("fla"):
        numbers = _rival_or_out_of_memory(recipe, side.removeprefix("fla-"), args)
    else:
        numbers = _ours(recipe, args)
    if args.json:
        write_output("--json", args.json, json.dumps(about | numbers))


def _ours(recipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    from hola_megatron.plan.parameters import parameters_by_part
    from hola_megatron.profile.profiler import ProfileOptions, profile_recipe
    from hola_megatron.startup.start import stop

    options = ProfileOptions(steps=args.steps, warmup=args.warmup, micro_batches=args.micro_batches, parts=False,
                             json_path=args.json)
    numbers = profile_recipe(recipe, options)
    numbers["parameters"] = parameters_by_part(recipe.model)["total"]
    stop()
    return numbers


def _rival_or_out_of_memory(recipe: Any, weights: str, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from hola_megatron.log.console import device_name
    from hola_megatron.profile.rival import time_rival

    try:
        numbers = time_rival(recipe, weights, steps=args.steps, warmup=args.warmup, micro_batches=args.micro_batches)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        return {"out_of_memory": str(error)}
    return numbers | {"device": device_name(torch.device("cuda"))}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a side, and how many times theirs ours is."""
    from hola_megatron.log.console import code_version
    from hola_megatron.profile.profile_report import table as markdown

    done = [row for row in rows.values() if "problem" not in row]
    lines = []
    if done:
        n = done[0]
        lines = [f"{n['micro_batches']} x {n['micro_batch_size']} x {n['sequence_length']} tokens a step on one "
                 f"{n['device']}; {code_version()}; " + ", ".join(f"{k} {v}" for k, v in n["versions"].items()), ""]
    rivals = [side for side in rows if side.startswith("fla") and "problem" not in rows[side]]
    head = ("", "parameters", "tok/s", *(f"x {side}" for side in rivals), "ms a step", "peak GB", "first step s",
            "compiled before")
    cells = []
    for side, row in rows.items():
        if "problem" in row:
            cells.append((f"{SIDES[side]}: {row['problem']}".replace("|", "/"), *["-"] * (len(head) - 1)))
            continue
        times = [f"{row['tokens_per_second'] / rows[rival]['tokens_per_second']:.2f}" for rival in rivals]
        cells.append((SIDES[side], f"{row['parameters'] / 1e6:.1f}M", f"{row['tokens_per_second']:,.0f}", *times,
                      f"{row['ms_per_step']:.1f}", f"{row['memory_gb']:.1f}", f"{row['first_step_s']:.1f}",
                      row["compiled_before"]))
    return "\n".join([*lines, *markdown(head, cells)])


def _check(args: argparse.Namespace, sides: list[str]) -> None:
    problems = [f"--sides: {side!r} is not one of {', '.join(SIDES)}" for side in sides if side not in SIDES]
    problems += [] if sides else ["--sides: none given"]
    problems += [f"--{name}: {value} must be at least 1" for name, value in (
        ("steps", args.steps), ("warmup", args.warmup), ("micro-batches", args.micro_batches)) if value < 1]
    if args.timeout <= 0:
        problems.append(f"--timeout: {args.timeout} must be above 0")
    if problems:
        raise RecipeError(problems)


if __name__ == "__main__":
    run_cli(main)
