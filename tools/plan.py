"""What a recipe costs on N GPUs, before anything is queued: no GPU, no torch, a second.

    python tools/plan.py recipes/hola_7b.yaml --gpus 64 --memory 80 [section.key=value ...]
    python tools/plan.py recipes/hola_7b.yaml --gpus 64 --device h200 --mfu 0.4 --json plan.json
    python tools/plan.py recipes/*.yaml --table                     every recipe on 8, 64, 512 GPUs of 80 and 141 GB
    python tools/plan.py recipes/*.yaml --hours --device h200       predicted hours on 1, 4, 8, 64 GPUs

Exit codes: 0 it fits, 1 it does not (other layouts are suggested as overrides to paste), 2 recipe or arguments.
GB are 10^9 bytes. How the memory is counted, and its error against measured peaks: docs/plan.md.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import dataclasses
import json

from hola_megatron.arguments import Parser, any_number, any_whole
from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError, run_cli
from hola_megatron.model.flops import peak_flops
from hola_megatron.paths import output_file, write_output
from hola_megatron.plan.estimate import Machine, make_plan
from hola_megatron.plan.measured import measured_table
from hola_megatron.plan.report import report
from hola_megatron.plan.table import hours_table, layout_table

# name: (as the driver calls it, GB of 10^9 bytes as sold, bytes a second of its memory by the datasheet)
DEVICES = {"h100": ("NVIDIA H100 80GB HBM3", 80.0, 3.35e12), "h100-pcie": ("NVIDIA H100 PCIe", 80.0, 2.0e12),
           "h200": ("NVIDIA H200", 141.0, 4.8e12), "a100": ("NVIDIA A100-SXM4-80GB", 80.0, 2.04e12),
           "a100-40": ("NVIDIA A100-SXM4-40GB", 40.0, 1.56e12), "b200": ("NVIDIA B200", 180.0, 8.0e12)}


def main() -> int:
    args = _arguments()
    recipes = [word for word in args.words if "=" not in word]
    overrides = [word for word in args.words if "=" in word]
    if args.measured:
        print(measured_table())
        return 0
    if args.hours:
        return _print_hours(args, recipes, overrides)
    if args.table:
        return _print_table(args, recipes, overrides)
    problems = [] if len(recipes) == 1 else [f"{len(recipes)} recipes given; name one (several with --table)"]
    machine = _machine(args, problems)
    if problems:
        raise RecipeError(problems)
    recipe = load_recipe(recipes[0], overrides)
    if machine.peak_flops is None and recipe.log.peak_tflops:
        machine = dataclasses.replace(machine, peak_flops=recipe.log.peak_tflops * 1e12)
    plan = make_plan(recipe, machine)
    print(report(plan))
    if args.json:
        write_output("--json", args.json, json.dumps(plan.to_dict(), indent=1) + "\n")
    return 0 if plan.fits else 1


def _print_table(args: argparse.Namespace, recipes: list[str], overrides: list[str]) -> int:
    if not recipes or any(x is not None for x in (args.gpus, args.memory, args.device, args.peak_tflops, args.json)):
        raise RecipeError("--table: takes recipes and overrides only; its machines are fixed")
    print(layout_table([load_recipe(path, overrides) for path in recipes]))
    return 0


def _print_hours(args: argparse.Namespace, recipes: list[str], overrides: list[str]) -> int:
    if not recipes or not args.device or any(x is not None for x in (args.gpus, args.json)):
        raise RecipeError("--hours: takes recipes, overrides and --device; its numbers of GPUs are fixed")
    problems: list[str] = []
    args.gpus = 1
    machine = _machine(args, problems)
    if problems:
        raise RecipeError(problems)
    print(hours_table([load_recipe(path, overrides) for path in recipes], machine))
    return 0


def _arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="RECIPE | section.key=value")
    parser.add_argument("--gpus", type=any_whole, help="all GPUs of the run")
    parser.add_argument("--memory", type=any_number, help="GB of one GPU; default what --device has")
    parser.add_argument("--device", choices=sorted(DEVICES), help="gives the peak, for hours, and the memory")
    parser.add_argument("--peak-tflops", type=any_number, help="dense bf16 peak of one GPU, where --device knows none")
    parser.add_argument("--mfu", type=any_number, help="share of the peak that is reached, for hours; default: "
                        "predicted from the layout (docs/plan.md)")
    parser.add_argument("--json", type=output_file("--json"), help="write all numbers here")
    parser.add_argument("--measured", action="store_true", help="measured runs and what is predicted of them, Markdown")
    parser.add_argument("--table", action="store_true", help="recipes on 8, 64, 512 GPUs of 80 and 141 GB, Markdown")
    parser.add_argument("--hours", action="store_true", help="predicted hours on 1, 4, 8, 64 GPUs, Markdown")
    return parser.parse_intermixed_args()


def _machine(args: argparse.Namespace, problems: list[str]) -> Machine:
    """Adds what is wrong with the arguments to `problems`."""
    name, memory, bandwidth = DEVICES.get(args.device, ("", None, None))
    memory = args.memory if args.memory is not None else memory
    for flag, value in (("--gpus", args.gpus), ("--memory", memory)):
        if value is None:
            problems.append(f"{flag}: is missing; give a number above 0"
                            + (f", or --device {', '.join(sorted(DEVICES))}" if flag == "--memory" else ""))
        elif not value > 0:
            problems.append(f"{flag}: {value} is not allowed; give a number above 0")
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        problems.append(f"--peak-tflops: {args.peak_tflops} is not allowed; give a number above 0")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        problems.append(f"--mfu: {args.mfu} is not allowed; give a share above 0 and at most 1")
    return Machine(args.gpus or 0, memory or 0.0, peak_flops(name, args.peak_tflops), args.mfu,
                   None if args.peak_tflops else bandwidth, args.device)


if __name__ == "__main__":
    run_cli(main)
