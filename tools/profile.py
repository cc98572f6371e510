"""How fast a recipe trains on this machine, and where the time goes.

    python tools/profile.py recipes/hola_340m.yaml [section.key=value ...] [--steps 10] [--trace FILE] [--json FILE]
    python -m hola_megatron.launch --nproc-per-node 2 tools/profile.py recipes/hola_340m.yaml

Synthetic tokens by default; --data reads the recipe's own. Times whole optimizer steps after a warm-up, prints
tokens/s, MFU and HFU by the stated formula (hola_megatron/model/flops.py), peak memory, and the GPU time by part.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
from pathlib import Path

from hola_megatron.config import load_recipe
from hola_megatron.errors import run_cli
from hola_megatron.monitor.profiler import profile_recipe
from hola_megatron.parallel.groups import stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before timing (kernels are compiled in the first)")
    parser.add_argument("--micro-batches", type=int, default=None,
                        help="micro-batches a rank makes for a step; default the recipe's (fewer is quicker to time)")
    parser.add_argument("--data", action="store_true", help="read the recipe's data instead of synthetic tokens")
    parser.add_argument("--trace", type=Path, default=None, help="write a torch profiler trace of one step here")
    parser.add_argument("--json", type=Path, default=None, help="write all numbers here")
    args = parser.parse_intermixed_args()
    profile_recipe(load_recipe(args.recipe, args.overrides), steps=args.steps, warmup=args.warmup,
                   micro_batches=args.micro_batches, real_data=args.data, trace=args.trace, json_path=args.json)
    stop()


if __name__ == "__main__":
    run_cli(main)
