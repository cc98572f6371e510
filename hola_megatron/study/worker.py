"""A process that takes runs of a study until none is left. Any number of them may work on one folder.

    python -m hola_megatron.study.worker STUDY --out FOLDER [--smoke] [--set KEY=VALUE] [--number N] [--ranks N]

tools/experiment.py starts them; a task of a Slurm array is one with --number. A GPU is given by CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from hola_megatron.arguments import Parser, count, whole
from hola_megatron.errors import EXIT_INTERRUPTED, RecipeError, UserError, one_line, run_cli
from hola_megatron.study.runs import Run, runs_of, versions
from hola_megatron.study.table import load_study

PARENT_SECONDS = 1.0


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m hola_megatron.study.worker", description="Take runs of a study until none is left.")
    made.add_argument("study", type=Path)
    made.add_argument("--out", type=Path, required=True, help="folder of the study's runs")
    made.add_argument("--smoke", action="store_true", help="the study's small form")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of every recipe")
    made.add_argument("--number", type=whole(0), help="this run alone, by its number in the table")
    made.add_argument("--parent", type=whole(1), metavar="PID", help="end when this process, the parent, has ended")
    made.add_argument("--ranks", type=count, default=1, help="processes (GPUs) of one run; default %(default)s")
    return made


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a run failed."""
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))
    if args.parent is not None:
        threading.Thread(target=_end_with, args=(args.parent,), daemon=True).start()
    study = load_study(args.study, smoke=args.smoke, settings=args.set)
    runs = runs_of(study, args.out)
    if args.number is not None:
        if args.number >= len(runs):
            raise RecipeError(f"--number: {args.number}, and the study has the runs 0 to {len(runs) - 1}")
        runs = [runs[args.number]]
        (runs[0].folder / "failed.json").unlink(missing_ok=True)
    codes = [work(run, ranks=args.ranks) for run in runs]
    return int(any(codes))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def work(run: Run, *, ranks: int = 1) -> bool:
    """Do a run that is neither finished nor failed nor another process's; returns whether it failed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with run.locked() as taken:
        if not taken or run.done or run.failed:
            return False
        print(f"{run}: started", flush=True)
        began = time.monotonic()
        try:
            record = _carry_out(run, ranks)
        except Exception as error:  # one run must not end the others
            if not isinstance(error, UserError):
                traceback.print_exc()
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            run.write("failed.json", {"problem": problem, "log": str(run.folder)})
            print(f"{run}: failed: {one_line(error)}", flush=True)
            return True
        run.write("done.json", {**record, "seconds": time.monotonic() - began})
        print(f"{run}: finished", flush=True)
        return False


def _carry_out(run: Run, ranks: int) -> dict[str, Any]:
    """The record of a finished run, without its seconds."""
    import torch  # slow, and not needed by --help

    from hola_megatron.log.console import code_version, device_name
    from hola_megatron.study.recipe_run import commands_of, run_recipe

    study, arm = run.study, run.arm
    on_gpu = torch.cuda.is_available()
    more, graph = _graph_setting(run) if study.cuda_graph and on_gpu else ([], None)
    if study.task is None:
        measures = run_recipe(run, ranks, more)
        commands = [shlex.join(words) for words in commands_of(run, ranks, more)]
    else:
        from hola_megatron.study.task_run import run_task

        measures = run_task(study.recipe_of(arm, run.seed, *more), study.task, run.folder,
                            by_task_score=arm.given_score is not None)
        commands = [f"hola_megatron.study.task_run.run_task: {study.recipe_path(arm)} "
                    + shlex.join(study.settings(arm, run.seed, *more))]
    return {"fingerprint": study.fingerprint(arm, run.seed), "commands": commands, "measures": measures,
            "code": code_version(), "device": device_name(torch.device("cuda" if on_gpu else "cpu")),
            "versions": versions(), "graph": graph}


def _graph_setting(run: Run) -> tuple[list[str], str | None]:
    """The override for a CUDA graph, or why there is none."""
    if run.arm.given_score:
        return [], "scores from outside change from step to step"
    setting = "train.cuda_graph=true"
    try:
        run.study.recipe_of(run.arm, run.seed, setting)
    except RecipeError as error:
        return [], error.problems[0]
    return [setting], None


if __name__ == "__main__":
    run_cli(main)
