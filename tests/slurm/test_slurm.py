"""The real scripts under a real Slurm: interrupted in every way Slurm has, and the same run in the end.

The cluster has virtual nodes on loopback (cluster.py). Most jobs are submitted at once and run beside
each other, as they mostly wait; every test then looks at its own.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, install
from helpers import LONG, ROOT, checkpoint_tensors, metric_rows, run_ranks
from jobs import Job, Submitter

pytestmark = pytest.mark.distributed

# of the run that is interrupted: (at which step, command). One interruption costs two starts of the program a rank
INTERRUPTIONS = [
    (3, "scontrol", "requeue"),                   # as preemption: SIGTERM to all, later SIGKILL
    (6, "scancel", "--signal=TERM"),              # to the ranks' step
    (9, "scancel", "--batch", "--signal=USR1")]   # as --signal=B:USR1@300: to the script
if not LONG:
    INTERRUPTIONS = INTERRUPTIONS[:1]
STEPS = 36 if LONG else 20


@pytest.fixture(scope="module")
def submit(tmp_path_factory, text_data) -> Iterator[Submitter]:
    reason = install()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: sockets have names of at most 107 bytes
        cluster = Cluster(Path(folder), nodes=4)  # the preempted run has two of them
        try:
            cluster.start()
            yield Submitter(cluster, tmp_path_factory.mktemp("jobs"), text_data, train__steps=STEPS)
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def jobs(submit) -> dict[str, Job]:
    """Most of them: while one starts or waits, another runs."""
    submit.run("preempted").mkdir(parents=True)  # a run of an earlier day, which --new moves aside
    (submit.run("preempted") / "of_an_earlier_day").touch()
    return {
        # one rank on each of two nodes, so that a run has a rendezvous between nodes
        "preempted": submit("preempted", "--new", options=("--nodes=2",), ranks=1),
        "bad": submit("bad", "train.stpes=3", by_itself=True),
        "one_rank": submit("one_rank", options=("--nodes=2",), ranks=1, HOLA_SITE=str(two_codes(submit))),
        "full": submit("full", HOLA_MIN_FREE_GB="1000000000"),
        "no_gpu": submit("no_gpu", ranks=999, DEVICE="cuda"),
    }


def two_codes(submit: Submitter) -> Path:
    """A site whose second node's launcher meets bad data, and whose first one says, as it would, that it lost it."""
    python, site = submit.folder / "python", submit.folder / "two_codes.sh"
    python.write_text(f"""#!/bin/bash
if [[ " $* " == *" hola_megatron.launch "* ]]; then
    [ "$SLURM_PROCID" = 0 ] && sleep 3 && exit 76
    exec {sys.executable} -m hola_megatron.launch --standalone --nproc-per-node 1 --no-python bash -c 'exit 3'
fi
exec {sys.executable} "$@"
""")
    python.chmod(0o755)
    site.write_text(submit.site.read_text() + f"HOLA_PYTHON={python}\n")
    return site


@pytest.fixture(scope="module")
def tasks(submit) -> list[Job]:
    """The two tasks of an array."""
    swept = submit.folder / "sweep.txt"
    swept.write_text(f"run_dir={submit.folder}/swept-%a\ntrain.seed=2\n")
    array = submit("array", options=("--array=1-2",), HOLA_SWEEP=str(swept), HOLA_MAX_RESTARTS="1",
                   SBATCH_OUTPUT=str(submit.folder / "array-%a.log"))
    return [Job(array.cluster, f"{array.number}_{task}", submit.folder / f"array-{task}.log", array.run)
            for task in (1, 2)]


def on_cpu() -> None:
    """As site.sh has it."""
    os.environ["HOLA_DEVICE"] = "cpu"


def test_an_interrupted_run_ends_as_the_uninterrupted_one(jobs, submit):
    job = jobs["preempted"]
    for number, (step, *command) in enumerate(INTERRUPTIONS):
        job.wait_for_step(step)
        job.cluster.ask(*command, job.number, check=True)
        job.wait_for("stopped by SIG", number + 1)
        if number == 0:  # Slurm takes 12 seconds now until it starts the job again
            whole = run_ranks([str(submit.recipe("whole"))], submit.folder / "whole.log", ranks=2, before=on_cpu)
            assert whole.code == 0, whole.output
        job.wait_for(f"attempt {number + 2},")
        assert metric_rows(job.run)[-1]["step"] < STEPS, "the signal came too late to interrupt anything"
    assert job.wait_for_end() == "0:0", job.said()
    assert job.field("Restarts") == str(len(INTERRUPTIONS))

    runs = [submit.run(name) for name in ("whole", "preempted")]
    want, have = (metric_rows(run) for run in runs)
    assert [row["step"] for row in have] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in have] == [row["loss"] for row in want]
    ends = [run / f"checkpoints/step_{STEPS:08d}" for run in runs]
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        want, have = (checkpoint_tensors(end, kind) for end in ends)
        assert want.keys() == have.keys() and all(want[name].equal(have[name]) for name in want)
    hashes = [json.loads((end / "manifest.json").read_text())["files"] for end in ends]
    assert hashes[0] == hashes[1]  # size and sha256 of every file


def test_the_log_goes_on_and_says_what_happened(jobs):
    said = jobs["preempted"].said()
    for attempt in range(1, len(INTERRUPTIONS) + 2):
        assert f"attempt {attempt}, 2 x 1 ranks on node[" in said
    assert len(re.findall(r"resuming at step \d+", said)) == len(INTERRUPTIONS)
    assert "restarts without progress: 0" in said and "restarts without progress: 1" not in said
    assert re.search(r"health \| node\d: .* writable, \d+ GB free", said)
    assert "slurm | OMP_NUM_THREADS=1" in said and "slurm | finished" in said
    assert "Traceback" not in said and "Exception" not in said


def test_new_is_carried_out_once_and_not_after_a_restart(jobs):
    beside = jobs["preempted"].run.parent
    assert [path.name for path in beside.iterdir() if path.name.startswith("run.old")] == ["run.old-1"]
    assert (beside / "run.old-1/of_an_earlier_day").exists()


def test_a_bad_recipe_is_code_2_and_not_queued_again(jobs):
    assert jobs["bad"].wait_for_end() == "2:0"
    assert jobs["bad"].field("Restarts") == "0"
    said = jobs["bad"].said()
    assert "train.stpes: no such key (did you mean train.steps?)" in said
    assert "slurm | code 2: the recipe cannot be used (see above); not queued again" in said


def test_what_one_node_finds_decides_and_not_what_the_others_lose(jobs):
    assert jobs["one_rank"].wait_for_end() == "3:0", jobs["one_rank"].said()
    assert jobs["one_rank"].field("Restarts") == "0"
    assert "slurm | code 3: the data cannot be used" in jobs["one_rank"].said(), jobs["one_rank"].said()
    assert not list(jobs["one_rank"].run.parent.glob(".exit-*"))


@pytest.mark.parametrize(("name", "problem"), [
    ("full", r"health \| node\d: \S+: \d+ GB free, 1000000000 needed \(HOLA_MIN_FREE_GB\); free space"),
    ("no_gpu", r"health \| node\d: (no nvidia-smi, and 999 GPUs are|\d+ GPUs, and 999 are|nvidia-smi fails)")],
    ids=["full", "no_gpu"])
def test_an_unfit_node_is_named_before_the_start(name, problem, jobs):
    job = jobs[name]
    assert job.wait_for_end() == "1:0"
    assert job.field("Restarts") == "0"
    assert re.search(problem, job.said()), job.said()
    assert "health: a node is not fit" in job.said() and not job.run.exists()
    assert not list(job.run.parent.glob(".health-*"))


def test_a_cancelled_task_stays_cancelled_and_has_its_own_run(submit, tasks):
    first = tasks[0]
    first.wait_for("health | node")
    submit.cluster.ask("scancel", first.number, check=True)
    first.wait_for_end()
    assert first.field("JobState") == "CANCELLED" and first.field("Restarts") == "0"
    assert "queueing" not in first.said()
    assert f"run folder {submit.folder}/swept-1," in first.said()


def test_restarts_without_progress_are_bounded(submit, tasks):
    first, last = tasks  # the last task's SLURM_JOB_ID is that of the whole array
    for attempt in (1, 2):
        last.wait_for("health | node", attempt)  # healthy, and the first step is many seconds away
        submit.cluster.ask("scancel", "--batch", "--signal=TERM", last.number, check=True)
        last.wait_for("SIGTERM: telling the ranks to save and stop", attempt)
    assert last.wait_for_end() == "75:0", last.said()
    assert last.field("Restarts") == "1"
    assert "restarts without progress: 1 (at most 1)" in last.said()
    assert "giving up after 1 restarts without a checkpoint newer than step -1 in" in last.said()
    assert f"run folder {submit.folder}/array/run-2," in last.said()
    assert first.field("JobState") == "CANCELLED" and first.field("Restarts") == "0"


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("hola_*.sh")))
def test_every_script_can_be_submitted_and_names_a_recipe(script, submit):
    said = submit.cluster.ask("sbatch", "--test-only", "--gpus-per-node=0", "--nodes=1", f"slurm/{script}",
                              folder=ROOT, check=True)
    assert "to start at" in said
    text = (ROOT / "slurm" / script).read_text()
    assert (ROOT / re.search(r"RECIPE=(\S+)", text)[1]).is_file()
    for line in ("--requeue", "--open-mode=append", "--signal=B:USR1@300", "--output=%x-%j.log"):
        assert f"#SBATCH {line}\n" in text
