"""Jobs of a test's own Slurm, submitted by the real scripts: what they say, which step they have reached."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster
from helpers import ROOT, metric_rows, write_recipe

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass
class Job:
    """A submitted job, its log and its run folder."""

    cluster: Cluster
    number: str
    log: Path
    run: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def field(self, name: str) -> str:
        return self.cluster.job(self.number).get(name, "")

    def wait(self, what: Callable[[], bool], meaning: str, seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        for look in itertools.count(1):
            if what():
                return
            state = self.field("JobState") if look % 10 == 0 else ""  # asking Slurm takes more than looking
            if (state in ENDED or time.monotonic() > deadline) and not what():
                raise AssertionError(f"job {self.number} ({state}) never: {meaning}\n{self.said()[-4000:]}\n"
                                     f"{self.cluster.logs()[-4000:]}")
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        metrics = self.run / "metrics.jsonl"
        self.wait(lambda: metrics.exists() and max((row["step"] for row in metric_rows(self.run)), default=0) >= step,
                  f"step {step}")

    def wait_for(self, text: str, times: int = 1) -> None:
        self.wait(lambda: self.said().count(text) >= times, f"{times} x {text!r}")

    def wait_for_end(self) -> str:
        """Its exit code, as Slurm keeps it (code:signal)."""
        self.wait(lambda: self.field("JobState") in ENDED, "ended")
        return self.field("ExitCode")

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run / "checkpoints").iterdir())


class Submitter:
    """Writes a recipe and submits the real script with it."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path, **changes: Any):
        """changes: of every recipe, as for `write_recipe`."""
        self.cluster, self.folder, self.data, self.changes = cluster, folder, data, changes
        self.site = folder / "site.sh"
        self.site.write_text(f"HOLA_PYTHON={sys.executable}\nexport HOLA_DEVICE=${{DEVICE:-cpu}}\n"
                             "export TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 SBATCH_GPUS_PER_NODE=0\n")

    def run(self, name: str) -> Path:
        return self.folder / name / "run"

    def recipe(self, name: str) -> Path:
        return write_recipe(self.folder / f"{name}.json", self.data / "train", run_dir=str(self.run(name)),
                            **self.changes)

    def __call__(self, name: str, *arguments: str, options: tuple[str, ...] = (), ranks: int = 2,
                 by_itself: bool = False, **environment: str) -> Job:
        """`sbatch options slurm/hola_340m.sh arguments`; with by_itself the script calls sbatch."""
        recipe, run, log = self.recipe(name), self.run(name), self.folder / f"{name}.log"
        variables = {"HOLA_SITE": str(self.site), "HOLA_RECIPE": str(recipe), "HOLA_RANKS_PER_NODE": str(ranks),
                     "HOLA_MIN_FREE_GB": "1", "SBATCH_OUTPUT": str(log), **environment}
        command = ["slurm/hola_340m.sh"] if by_itself else ["sbatch", "--gpus-per-node=0", *options,
                                                            "slurm/hola_340m.sh"]
        said = self.cluster.ask(*command, *arguments, environment=variables, folder=ROOT, check=True)
        return Job(self.cluster, re.search(r"batch job (\d+)", said)[1], log, run)
