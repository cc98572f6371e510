"""Studies: a table of recipes x seeds, run on what is there, and one report.

    python tools/experiment.py recipes/studies/far_mqar.yaml --smoke       # minutes on a laptop's CPU
    python tools/experiment.py recipes/studies/far_mqar.yaml --per-gpu 4   # four small runs on every GPU
    python tools/experiment.py STUDY --gpus-per-run 4                      # several GPUs a run
    python tools/experiment.py STUDY --slurm partition=gpu gpus=1          # writes a job array, does not submit it
    python tools/experiment.py STUDY --report                              # only the report, of what is finished

The same command goes on: finished runs are kept, failed ones tried again, and runs of another process left to it.
Exit codes: 0 all runs are finished, 1 some failed, 2 the study cannot be used. docs/experiment.md
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import shlex
import sys
import time
from pathlib import Path

from hola_megatron.arguments import Parser, count
from hola_megatron.errors import RecipeError, run_cli
from hola_megatron.paths import local, output
from hola_megatron.study.recipe_run import not_prepared, run_before
from hola_megatron.study.report import command_text, write_report
from hola_megatron.study.runs import Run, check_finished, runs_of
from hola_megatron.study.start import chosen_gpus, places, work_all, write_array
from hola_megatron.study.table import Study, load_study


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", type=local("STUDY"), help="YAML file of the study")
    add("--smoke", action="store_true", help="the study's small form, which shows that everything runs")
    add("--out", type=output("--out"), help="folder of runs and report; default: runs/studies/NAME, or NAME-smoke")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override of every arm's recipe")
    add("--gpus", default="all", help="all, none, or numbers as 0,1; default %(default)s")
    add("--per-gpu", type=count, default=1, help="runs that share a GPU; default %(default)s")
    add("--gpus-per-run", type=count, default=1, help="GPUs of one run of the trainer; default %(default)s")
    add("--jobs", type=count, help="runs at a time on the CPU; default: one for each core")
    add("--slurm", nargs="*", metavar="OPTION=VALUE", help="write a job array with these options of sbatch")
    add("--report", action="store_true", help="write the report of what is finished, run nothing")
    add("--list", action="store_true", help="print the runs and their states, run nothing")
    return parser


def main() -> int:
    args = _parser().parse_args()
    study = load_study(args.study, smoke=args.smoke, settings=args.set)
    if study.task is not None and args.gpus_per_run > 1:
        raise RecipeError("--gpus-per-run: a run on a generated task takes one GPU; give --per-gpu")
    out = args.out or Path("runs/studies") / (f"{study.name}-smoke" if args.smoke else study.name)
    runs = runs_of(study, out)
    check_finished(runs)
    if args.list:
        _list(study, runs)
        return 0
    worker = [str(args.study), "--out", str(out), *(["--smoke"] if args.smoke else []),
              *(word for text in args.set for word in ("--set", text)),
              *(["--ranks", str(args.gpus_per_run)] if args.gpus_per_run > 1 else [])]
    command = command_text("tools/experiment.py", sys.argv[1:])
    if args.slurm is not None:
        submit = write_array(out, study.name, len(runs), worker, [f"--{option}" for option in args.slurm])
        for words in not_prepared(study, out):
            print(f"first:            {shlex.join(words)}")
        print(f"submit:           {shlex.join(submit)}")
        print(f"then the report:  {command_text('tools/experiment.py', worker)} --report")
        return 0
    if not args.report:
        _work(args, study, runs, worker, out)
    path = write_report(study, runs, out, command)
    finished = sum(bool(run.done) for run in runs)
    print(f"{finished} of {len(runs)} runs are finished; report: {path}")
    return 0 if args.report or finished == len(runs) else 1


def _work(args: argparse.Namespace, study: Study, runs: list[Run], worker: list[str], out: Path) -> None:
    """Start workers for the runs that are not finished."""
    waiting = [run for run in runs if not run.done]
    for arm in study.arms:
        if reason := study.unsupported(arm):
            print(f"{arm.name}: not run, this version's recipes do not support it: {reason}")
    if not waiting:
        return
    out.mkdir(parents=True, exist_ok=True)
    run_before(study, out)
    for run in waiting:
        if not run.is_locked:
            (run.folder / "failed.json").unlink(missing_ok=True)
    gpus = chosen_gpus(args.gpus)
    where = places(gpus, per_gpu=args.per_gpu, gpus_per_run=args.gpus_per_run, jobs=args.jobs, runs=len(waiting))
    device = f"GPUs {','.join(gpus)}" if gpus else "the CPU"
    print(f"{study.name}: {len(runs)} runs, {len(waiting)} to do, {len(where)} at a time on {device}; {out}",
          flush=True)
    began = time.monotonic()
    codes = work_all(runs, where, worker, out, lambda line: print(line, flush=True))
    print(f"{time.monotonic() - began:.0f} seconds")
    if broken := [str(number) for number, code in enumerate(codes) if code not in (0, 1)]:
        print(f"workers that ended early (their logs say why): {', '.join(f'{out}/workers/{n}.log' for n in broken)}")
    for run in runs:
        if not run.done and not run.failed and run.is_locked:
            print(f"{run}: another process works on it")


def _list(study: Study, runs: list[Run]) -> None:
    for number, run in enumerate(runs):
        state = "finished" if run.done else "running" if run.is_locked else "failed" if run.failed else "to do"
        print(f"{number:4d}  {run.arm.name:20s} seed {run.seed:<6d} {state}")
    for arm in study.arms:
        if reason := study.unsupported(arm):
            print(f"   -  {arm.name:20s} not supported: {reason}")


if __name__ == "__main__":
    run_cli(main)
