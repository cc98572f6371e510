"""The training program.

    python -m hola_megatron.train RECIPE [section.key=value ...] [--new] [--allow-change] [--replay INCIDENT]
    torchrun --nproc-per-node 8 -m hola_megatron.train RECIPE ...

Resuming is the default: the newest complete checkpoint of the run folder wins. Exit codes:
0 finished, 2 recipe or checkpoint, 3 data, 4 diverged, 75 stopped by a signal with a checkpoint
saved, 76 a rank died or hung (both: start the same command again). The loop is in trainer.py;
here the recipe is read first, so that a mistake in it is told in a second.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401  (first: it sets what later imports say)

import argparse
import os
from pathlib import Path

from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError, run_cli
from hola_megatron.recipe_checks import check_recipe


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hola_megatron.train", description="Train a recipe.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--new", action="store_true", help="start over; an earlier run's folder is moved aside")
    parser.add_argument("--allow-change", action="store_true",
                        help="resume although the recipe or the data differ from the checkpoint's")
    parser.add_argument("--replay", type=Path, metavar="INCIDENT",
                        help="run the batches of RUN/incidents/step_N again without updating, and stop")
    args = parser.parse_intermixed_args(argv)
    recipe = load_recipe(args.recipe, args.overrides)
    if problems := check_recipe(recipe, world_size=int(os.environ.get("WORLD_SIZE", "1"))):
        raise RecipeError(problems)
    # from here on the imports cost seconds
    from hola_megatron.parallel.groups import stop

    if args.replay:
        from hola_megatron.replay import replay

        replay(recipe, args.replay)
    else:
        from hola_megatron.trainer import train

        train(recipe, new=args.new, allow_change=args.allow_change)
    stop()  # an early exit would make peers wait for a rank that is gone


if __name__ == "__main__":
    run_cli(main)
