"""The real scripts on four machines under a real Slurm: a slow node, a drained one, and two that lose their power.

The machines are namespaces (machines.py): each has its address, host name and processes.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, install
from helpers import ROOT, metric_rows
from jobs import Job, Submitter
from machines import Machines, problem

pytestmark = [pytest.mark.distributed, pytest.mark.long]

STEPS = 48
# a module system's function sets what depends on the node; one node has another setting than the others
SITE = """
module() { [ "$1" = load ] && export FABRIC_HOME="/opt/$2 of $(hostname)"; }
module load fabric
[ "$(hostname)" != node2 ] || export NCCL_IB_HCA=mlx5_9
"""


@pytest.fixture(scope="module")
def submit(tmp_path_factory, text_data) -> Iterator[Submitter]:
    if reason := problem() or install():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: sockets have names of at most 107 bytes
        machines = Machines(Path(folder), 4)
        cluster = Cluster(Path(folder), machines=machines)
        try:
            machines.start()
            cluster.start()
            submit = Submitter(cluster, tmp_path_factory.mktemp("jobs"), text_data, train__steps=STEPS,
                               checkpoint__every=3, log__straggler_ratio=3.0)
            submit.site.write_text(submit.site.read_text() + SITE)
            yield submit
        finally:
            cluster.stop()
            machines.stop()


def environment_of(process: int) -> dict[str, str]:
    try:
        words = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def rank_process(job: Job, rank: int) -> int:
    """Process id of a rank of the job, which the launcher has started (the rank's own children look like it)."""
    found = [process for process in map(int, filter(str.isdigit, os.listdir("/proc")))
             if (seen := environment_of(process)).get("SLURM_JOB_ID") == job.number and seen.get("RANK") == str(rank)]
    parents = {process: int(re.search(r"PPid:\t(\d+)", Path(f"/proc/{process}/status").read_text())[1])
               for process in found}
    return next(process for process in found if parents[process] not in found)


def stop_and_continue(process: int) -> None:
    """Most of the time it does not run, each time shorter than parallel.hang_seconds."""
    os.kill(process, signal.SIGSTOP)
    time.sleep(0.4)
    os.kill(process, signal.SIGCONT)
    time.sleep(0.05)


def last_step(job: Job) -> int:
    return metric_rows(job.run)[-1]["step"]


def test_the_doctor_names_what_differs_and_the_slow_node(submit):
    cluster, log = submit.cluster, submit.folder / "doctor.log"
    if reason := cluster.machines.limit("node3", "200mbit"):
        pytest.skip(reason)
    environment = {"HOLA_SITE": str(submit.site), "HOLA_RANKS_PER_NODE": "1", "SBATCH_OUTPUT": str(log)}
    said = cluster.ask("sbatch", "--nodes=3", "--gpus-per-node=0", "slurm/doctor.sh", environment=environment,
                       folder=ROOT, check=True)
    job = Job(cluster, re.search(r"batch job (\d+)", said)[1], log, submit.folder)
    assert job.wait_for_end() == "1:0", job.said()
    cluster.machines.remove_limit("node3")
    problems = [line for line in job.said().splitlines() if line.startswith("problem")]
    assert problems[0] == "problem  NCCL_IB_HCA: mlx5_9 on node2; nothing on node1, node3; make it equal on all nodes"
    assert problems[1].startswith("problem  node3: slow to all other nodes: "), job.said()
    assert "all-reduce over 3 ranks: 8 bytes " in job.said() and "WRONG" not in job.said()


def newest_checkpoint(job: Job) -> int:
    """Step of the newest whole one; -1 for none."""
    found = (job.run / "checkpoints").glob("step_*/manifest.json")
    return max((int(manifest.parent.name.removeprefix("step_")) for manifest in found), default=-1)


def lose(job: Job, node: str, before: int) -> None:
    """Cut a node's power once there is a checkpoint newer than that of step `before`."""
    job.wait(lambda: newest_checkpoint(job) > before, f"a checkpoint after step {before}")
    job.cluster.machines.power_off(node)
    assert last_step(job) < STEPS, "the run has ended already"


@pytest.mark.timeout(900)  # three starts of a job, and Slurm finds two nodes silent
def test_a_run_goes_on_over_slow_drained_and_dead_nodes(submit):
    cluster = submit.cluster
    job = submit("nodes", options=("--nodes=2",), ranks=1)
    job.wait_for_step(1)
    assert "attempt 1, 2 x 1 ranks on node[1-2], rendezvous at 10.213.77.11:" in job.said(), job.said()

    second = rank_process(job, 1)
    assert environment_of(second)["FABRIC_HOME"] == "/opt/fabric of node2"
    assert environment_of(rank_process(job, 0))["FABRIC_HOME"] == "/opt/fabric of node1"
    job.wait(lambda: stop_and_continue(second) or "slow | rank 1 on node2: " in job.said(), "rank 1 is named as slow")

    cluster.ask("scontrol", "update", "nodename=node2", "state=drain", "reason=slow", check=True)
    lose(job, "node1", -1)  # with the batch script, the rendezvous and rank 0
    job.wait_for("attempt 2, 2 x 1 ranks on node[3-4], rendezvous at 10.213.77.13:")
    job.wait_for("resuming at step")
    cluster.ask("scontrol", "update", "nodename=node2", "state=resume", check=True)
    lose(job, "node4", newest_checkpoint(job))
    job.wait_for("attempt 3, 2 x 1 ranks on node[2-3], rendezvous at 10.213.77.12:")
    assert job.wait_for_end() == "0:0", job.said()

    assert [row["step"] for row in metric_rows(job.run)] == list(range(1, STEPS + 1))
    assert job.field("Restarts") == "2" and job.said().count("resuming at step") == 2
    for node in ("node1", "node4"):
        assert "State=DOWN" in cluster.ask("scontrol", "show", "node", node, "-o")
    assert "restarts without progress: 1" not in job.said() and "Traceback" not in job.said(), job.said()
