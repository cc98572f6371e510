"""The training program.

    python -m hola_megatron.train RECIPE [section.key=value ...] [--new] [--allow-change] [--replay INCIDENT]
    torchrun --nproc-per-node 8 -m hola_megatron.train RECIPE ...

Resuming is the default, from the newest complete checkpoint of the run folder. Exit codes: 0 finished, 2 recipe or
checkpoint, 3 data, 4 diverged, 75 stopped by a signal with a checkpoint saved, 76 a rank died or hung (both: start the
same command again). The loop is in loop.py; the recipe is read here first, before the slow imports, so that a mistake
in it is reported in a second.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401  (first: it sets what later imports print)

import argparse
from pathlib import Path

from hola_megatron.arguments import Parser
from hola_megatron.control.launcher_watch import LAUNCHER
from hola_megatron.errors import run_cli
from hola_megatron.paths import local
from hola_megatron.recipe.loading import load_recipe
from hola_megatron.recipe.schema import Recipe
from hola_megatron.startup.roll_call import errors_reach_all_ranks
from hola_megatron.startup.world import read_world

LAUNCHER.start()  # before the slow imports: the launcher may end during them


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, read the recipe and run it."""
    parser = Parser(prog="python -m hola_megatron.train", description="Train a recipe.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--new", action="store_true", help="start over; an earlier run's folder is moved aside")
    parser.add_argument("--allow-change", action="store_true",
                        help="resume although the recipe or the data differ from the checkpoint's")
    parser.add_argument("--replay", type=local("--replay"), metavar="INCIDENT",
                        help="run the batches of RUN/incidents/step_N again without updating, and stop")
    world = read_world()
    with errors_reach_all_ranks():
        args = parser.parse_intermixed_args(argv)
        recipe = load_recipe(args.recipe, args.overrides, world_size=world.size)
        run(recipe, args)


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Train or replay, with non-blocking output and named communication errors."""
    # slow imports (seconds) from here on
    from hola_megatron.control.lost import lost_contact_named
    from hola_megatron.log.output import steady_output
    from hola_megatron.startup.start import stop

    with steady_output(), lost_contact_named(recipe.folder):
        _run(recipe, args)
    stop()  # an early exit would make peers wait for a rank that is gone


def _run(recipe: Recipe, args: argparse.Namespace) -> None:
    if args.replay:
        from hola_megatron.train.replay import replay

        replay(recipe, args.replay)
    else:
        from hola_megatron.train.loop import train

        train(recipe, new=args.new, allow_change=args.allow_change)


if __name__ == "__main__":
    run_cli(main)
