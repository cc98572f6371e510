"""What a recipe costs on N GPUs, before anything is queued: no GPU, no torch, a second.

    python tools/plan.py recipes/hola_7b.yaml --gpus 64 --memory 80 [section.key=value ...]
    python tools/plan.py recipes/hola_7b.yaml --gpus 64 --device h200 --mfu 0.4 --json plan.json
    python tools/plan.py recipes/*.yaml --table                     every recipe on 8, 64, 512 GPUs of 80 and 141 GB

Exit codes: 0 it fits, 1 it does not (other layouts are suggested as overrides to paste), 2 recipe or arguments.
GB are 10^9 bytes. How the memory is counted, and how well it meets measured peaks: docs/plan.md.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import json
from pathlib import Path
from typing import Any

from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError, run_cli
from hola_megatron.model.flops import peak_flops
from hola_megatron.plan.estimate import Machine, make_plan
from hola_megatron.plan.report import report
from hola_megatron.plan.table import layout_table

# name: (as the driver calls it, GB of 10^9 bytes as sold)
DEVICES = {"h100": ("NVIDIA H100 80GB HBM3", 80.0), "h100-pcie": ("NVIDIA H100 PCIe", 80.0),
           "h200": ("NVIDIA H200", 141.0), "a100": ("NVIDIA A100-SXM4-80GB", 80.0),
           "a100-40": ("NVIDIA A100-SXM4-40GB", 40.0), "b200": ("NVIDIA B200", 180.0)}


def main() -> int:
    args = _arguments()
    recipes = [word for word in args.words if "=" not in word]
    overrides = [word for word in args.words if "=" in word]
    if args.table:
        return _print_table(args, recipes, overrides)
    problems = [] if len(recipes) == 1 else [f"{len(recipes)} recipes given; name one (several with --table)"]
    machine = _machine(args, problems)
    if problems:
        raise RecipeError(problems)
    recipe = load_recipe(recipes[0], overrides)
    if machine.peak_flops is None and recipe.log.peak_tflops:
        machine = Machine(machine.gpus, machine.memory_gb, recipe.log.peak_tflops * 1e12, machine.mfu)
    plan = make_plan(recipe, machine)
    print(report(plan))
    if args.json:
        _write_json(args.json, plan.to_dict())
    return 0 if plan.fits else 1


def _print_table(args: argparse.Namespace, recipes: list[str], overrides: list[str]) -> int:
    if not recipes or any(x is not None for x in (args.gpus, args.memory, args.device, args.peak_tflops, args.json)):
        raise RecipeError("--table: takes recipes and overrides only; its machines are fixed")
    print(layout_table([load_recipe(path, overrides) for path in recipes]))
    return 0


def _write_json(path: Path, numbers: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(numbers, indent=1) + "\n")
    except OSError as error:
        raise RecipeError(f"--json: {path} cannot be written ({error.strerror})") from None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="+", metavar="RECIPE | section.key=value")
    parser.add_argument("--gpus", type=int, help="all GPUs of the run")
    parser.add_argument("--memory", type=float, help="GB of one GPU; default what --device has")
    parser.add_argument("--device", choices=sorted(DEVICES), help="gives the peak, for hours, and the memory")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of one GPU, where --device knows none")
    parser.add_argument("--mfu", type=float, default=0.44,
                        help="share of the peak that is reached, for hours (default 0.44: see docs/plan.md)")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--table", action="store_true", help="recipes on 8, 64, 512 GPUs of 80 and 141 GB, Markdown")
    return parser.parse_intermixed_args()


def _machine(args: argparse.Namespace, problems: list[str]) -> Machine:
    """Adds what is wrong with the arguments to `problems`."""
    name, memory = DEVICES.get(args.device, ("", None))
    memory = args.memory if args.memory is not None else memory
    for flag, value in (("--gpus", args.gpus), ("--memory", memory)):
        if value is None:
            problems.append(f"{flag}: is missing; give a number above 0"
                            + (f", or --device {', '.join(sorted(DEVICES))}" if flag == "--memory" else ""))
        elif not value > 0:
            problems.append(f"{flag}: {value} is not allowed; give a number above 0")
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        problems.append(f"--peak-tflops: {args.peak_tflops} is not allowed; give a number above 0")
    if not 0 < args.mfu <= 1:
        problems.append(f"--mfu: {args.mfu} is not allowed; give a share above 0 and at most 1")
    return Machine(args.gpus or 0, memory or 0.0, peak_flops(name, args.peak_tflops), args.mfu)


if __name__ == "__main__":
    run_cli(main)
