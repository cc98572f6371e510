"""The number of processes of this run, from torchrun's environment variables; one process without them.

A scheduler that starts several tasks without those variables would start several one-process runs in one folder. That
is refused here, before slow imports.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hola_megatron.errors import RecipeError

# MPI launchers set one of these
TASK_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "JSM_NAMESPACE_SIZE")
LARGEST_STEP = 0xFFFFFFF0  # Slurm's step ids from here on are the batch script, an interactive shell and the like
RIGHT_COMMAND = (
    "start one launcher a node, which starts a rank for each GPU: srun --nodes=N --ntasks-per-node=1 python -m "
    "hola_megatron.launch --nnodes=N --nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:PORT -m "
    "hola_megatron.train RECIPE (slurm/hola_1b.sh does it)")


@dataclass(frozen=True)
class World:
    """rank of size processes; alone: one process without a launcher."""

    rank: int
    size: int
    local_rank: int
    alone: bool


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """Read the environment. Raises RecipeError for inconsistent variables, or several tasks without them."""
    if "WORLD_SIZE" not in environment and "RANK" not in environment:
        if found := scheduler_tasks(environment):
            variable, count = found
            raise RecipeError(
                f"{variable}: {count} tasks of this program were started without WORLD_SIZE, so each would be a run of "
                f"its own in one folder; {RIGHT_COMMAND}; for one process start one task, for runs that are "
                "independent set WORLD_SIZE=1 and give each its own run_dir")
        return World(0, 1, 0, alone=True)
    size = _number(environment, "WORLD_SIZE", "1", least=1)
    if size == 1 and "RANK" not in environment:
        return World(0, 1, 0, alone=True)
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise RecipeError(f"{', '.join(missing)}: not set, and a run of several processes needs RANK, WORLD_SIZE, "
                          "MASTER_ADDR and MASTER_PORT; start it with python -m hola_megatron.launch or torchrun")
    rank, port = _number(environment, "RANK", "0", least=0), _number(environment, "MASTER_PORT", "0", least=0)
    if rank >= size:
        raise RecipeError(f"RANK: {rank} is not below WORLD_SIZE = {size}; ranks count from 0")
    if port > 65535:
        raise RecipeError(f"MASTER_PORT: {port} is no port; give 1 to 65535")
    return World(rank, size, _number(environment, "LOCAL_RANK", "0", least=0), alone=False)


def scheduler_tasks(environment: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """(variable, number of tasks) where a scheduler started this process as one of several tasks."""
    counts = [*_slurm_counts(environment), *((name, environment[name]) for name in TASK_COUNTS if name in environment)]
    if "FLUX_TASK_RANK" in environment:
        counts.append(("FLUX_JOB_SIZE", environment.get("FLUX_JOB_SIZE", "1")))
    for name, value in counts:
        if value.strip().isdigit() and int(value) > 1:
            return name, int(value)
    return None


def _slurm_counts(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Tasks of the srun step that this process belongs to.

    SLURM_NTASKS alone does not mean a step: sbatch and salloc set it for the whole job, in a script or a shell that
    runs once.
    """
    if "SLURM_STEP_NUM_TASKS" in environment:
        return [("SLURM_STEP_NUM_TASKS", environment["SLURM_STEP_NUM_TASKS"])]
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    in_step = step.isdigit() and int(step) < LARGEST_STEP
    in_script = "SLURM_JOB_ID" in environment and environment.get("SLURM_PROCID", "0") == "0"
    if not in_step and in_script:
        return []
    return [(name, environment[name]) for name in ("SLURM_NTASKS", "SLURM_NPROCS") if name in environment]


def refuse_several_launchers(nodes: str, standalone: bool, environment: Mapping[str, str] = os.environ) -> None:
    """RecipeError where a scheduler started several launchers that would each start a run of their own."""
    found = scheduler_tasks(environment)
    if found and nodes in ("1", "1:1") and not standalone:
        raise RecipeError(
            f"{found[0]}: {found[1]} launchers were started, each for one node (--nnodes={nodes}), so each would be a "
            f"run of its own in one folder; {RIGHT_COMMAND}; for runs that are independent give --standalone and each "
            "its own run_dir")


def _number(environment: Mapping[str, str], name: str, default: str, *, least: int) -> int:
    value = environment.get(name, default)
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise RecipeError(f"{name}: {value!r} is not a whole number of at least {least}; start the run with python -m "
                          "hola_megatron.launch or torchrun, which set it")
    return number
