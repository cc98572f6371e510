"""Workers of a study: on this machine's CPUs or GPUs, or as a Slurm array."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hola_megatron.errors import RecipeError, shown
from hola_megatron.study.runs import Run

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.3
WORKER = "hola_megatron.study.worker"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Place:
    """Where a worker runs: its GPUs (none: the CPU) and its threads."""

    gpus: tuple[str, ...]
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        threads = {name: os.environ.get(name, str(self.threads)) for name in THREADS}
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ",".join(self.gpus), "PYTHONPATH": paths}


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch  # slow

    return [str(number) for number in range(torch.cuda.device_count())]


def chosen_gpus(given: str) -> list[str]:
    """The GPUs that --gpus names: all, none, or some of the visible ones. Raises RecipeError."""
    if given == "none":
        return []
    visible = visible_gpus()
    if given == "all":
        return visible
    found = given.split(",")
    if unknown := [name for name in found if name not in visible]:
        raise RecipeError(f"--gpus: {shown(unknown[0])} is not a visible GPU; give all, none, or some of: "
                          f"{', '.join(visible) or 'none is visible'}")
    return found


def places(gpus: list[str], *, per_gpu: int, gpus_per_run: int, jobs: int | None, runs: int) -> list[Place]:
    """One place for every worker, no more than there are runs.

    Args:
        gpus: to use; empty: the CPU.
        per_gpu: workers that share one GPU.
        gpus_per_run: GPUs of one worker.
        jobs: workers on the CPU; None: one for each core.
        runs: number of runs.

    Raises:
        RecipeError: the numbers do not fit together.
    """
    cores = os.cpu_count() or 1
    if not gpus:
        if gpus_per_run > 1 or per_gpu > 1:
            raise RecipeError("--per-gpu, --gpus-per-run: this process sees no GPU; leave them away")
        count = min(jobs or cores, runs)
        return [Place((), max(1, cores // count))] * count
    if jobs is not None:
        raise RecipeError("--jobs: is for runs on the CPU; give --per-gpu, or --gpus none")
    if gpus_per_run > 1 and per_gpu > 1:
        raise RecipeError("--per-gpu: runs of several GPUs do not share them; give one of --per-gpu, --gpus-per-run")
    if gpus_per_run > len(gpus):
        raise RecipeError(f"--gpus-per-run: {gpus_per_run}, and there are {len(gpus)} GPUs")
    groups = [tuple(gpus[i: i + gpus_per_run]) for i in range(0, len(gpus) - gpus_per_run + 1, gpus_per_run)]
    found = groups * per_gpu  # first one worker a GPU, then the next one
    return [Place(group, max(1, cores // len(found))) for group in found[:runs]]


def worker_command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", WORKER, *arguments]


def work_all(runs: list[Run], where: list[Place], arguments: list[str], out: Path,
             tell: Callable[[str], None]) -> list[int]:
    """Start a worker in every place and wait for all; returns their exit codes. Their output is in OUT/workers/*.log.

    tell: called with one line for every run that ends. All workers end with this process.
    """
    (out / "workers").mkdir(parents=True, exist_ok=True)
    open_runs, workers = [run for run in runs if not run.done], []
    try:
        for number, place in enumerate(where):
            with (out / "workers" / f"{number}.log").open("a", encoding="utf-8") as log:
                command = worker_command([*arguments, "--parent", str(os.getpid())])
                workers.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                                stdin=subprocess.DEVNULL, env=place.environment))
        while any(worker.poll() is None for worker in workers):
            open_runs = _still_open(open_runs, len(runs), tell)
            time.sleep(POLL_SECONDS)
        _still_open(open_runs, len(runs), tell)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    return [worker.returncode for worker in workers]


def _still_open(runs: list[Run], total: int, tell: Callable[[str], None]) -> list[Run]:
    left = []
    for run in runs:
        if done := run.done:
            finished = sum(bool(other.done) for other in runs)
            tell(f"{run}: finished in {done['seconds']:.0f} s ({total - len(runs) + finished} of {total} runs)")
        elif failed := run.failed:
            tell(f"{run}: failed: {failed['problem']}")
        else:
            left.append(run)
    return left


def write_array(out: Path, name: str, runs: int, arguments: list[str], options: list[str]) -> list[str]:
    """Write OUT/array.sh, one task a run; returns the command that submits it.

    options: of sbatch, such as --partition=gpu. A task that Slurm ends can be submitted again: finished runs are kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = ["#!/bin/bash", f"#SBATCH --job-name={name}", f"#SBATCH --output={out.absolute()}/array-%a.log",
             "#SBATCH --open-mode=append", *(f"#SBATCH {option}" for option in options), "",
             f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
             '[ ! -f "${HOLA_SITE:=slurm/site.sh}" ] || source "$HOLA_SITE"  # modules, as for the other jobs',
             f"export PYTHONPATH={shlex.quote(f'{ROOT}{os.pathsep}{ROOT / "kernels"}')}${{PYTHONPATH:+:$PYTHONPATH}}",
             f'exec {shlex.join(worker_command(arguments))} --number "$SLURM_ARRAY_TASK_ID"']
    script = out / "array.sh"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["sbatch", f"--array=0-{runs - 1}", str(script)]
