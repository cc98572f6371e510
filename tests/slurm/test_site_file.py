"""The site file as the scripts read it: on the node where the command runs, and never silently left out."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

SITE = """
module() { [ "$1" = load ] && export CUDA_HOME="/opt/$2 on $SLURMD_NODENAME$NOT_SET_ANYWHERE"; }
module load cuda
HOLA_RUN=(never)
"""


def on_node(site: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "slurm/on_node.sh", *command], cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, "HOLA_SITE": str(site), **environment})


def test_modules_are_loaded_where_the_command_runs(tmp_path):
    """With a function that reads a variable which is not set, as module systems have them."""
    site = tmp_path / "site.sh"
    site.write_text(SITE)
    done = on_node(site, "bash", "-c", 'echo "$CUDA_HOME" "$1"; exit 7', "-", "two words",
                   SLURMD_NODENAME="node2", CUDA_HOME="of the first node")
    assert (done.returncode, done.stdout, done.stderr) == (7, "/opt/cuda on node2 two words\n", "")


def test_without_a_site_file_the_command_runs_as_it_is():
    environment = {name: value for name, value in os.environ.items() if name != "HOLA_SITE"}
    if (ROOT / "slurm/site.sh").exists():
        pytest.skip("this clone has a slurm/site.sh of its own")
    done = subprocess.run(["bash", "slurm/on_node.sh", "echo", "runs"], cwd=ROOT, capture_output=True, text=True,
                          check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "runs\n")


@pytest.mark.parametrize("script", ["on_node.sh", "doctor.sh", "hola_340m.sh", "prepare_data.sh"])
def test_a_site_file_that_is_not_there_is_refused(script, tmp_path):
    done = subprocess.run(["bash", f"slurm/{script}", "echo"], cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, "HOLA_SITE": str(tmp_path / "site.sh"), "SLURMD_NODENAME": "node2"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"HOLA_SITE: node2 has no file {tmp_path}/site.sh" in done.stderr and done.stdout == ""
