"""slurm/prepare_data.sh under a real Slurm: the array's parts, one of them requeued, and the job that joins them."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from cluster import Cluster, install
from helpers import ROOT

from hola_megatron.data.prepare import PrepareOptions, prepare

pytestmark = pytest.mark.distributed

WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them "


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def cluster():
    if reason := install():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: sockets have names of at most 107 bytes
        cluster = Cluster(Path(folder), nodes=2)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.mark.long
def test_an_array_of_parts_is_joined(cluster, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(4):
        lines = ['{"text": "' + WORDS * (1 + (n * 7 + number) % 40) + '"}\n' for n in range(400)]
        (corpus / f"{number}.jsonl").write_text("".join(lines))
    prepare(PrepareOptions([str(corpus)], str(tmp_path / "expected"), "bytes", 64, parts=3))
    site = tmp_path / "site.sh"
    site.write_text(f"HOLA_PYTHON={sys.executable}\nexport TORCHDYNAMO_DISABLE=1 SBATCH_GPUS_PER_NODE=8\n")
    environment = {"HOLA_SITE": str(site), "SBATCH_OUTPUT": str(tmp_path / "%j.log"), "PYTHONPATH": str(ROOT),
                   "HOLA_PREPARE_CPUS": "1"}
    out = tmp_path / "out"
    said = cluster.ask("bash", "slurm/prepare_data.sh", "3", str(corpus), "--tokenizer", "bytes", "--sequence-length",
                       "64", f"--out={out}", environment=environment, folder=ROOT, check=True)
    array, joining = re.search(r"job (\d+): 3 parts; job (\d+): joins them in", said).groups()
    cluster.ask("scontrol", "requeue", f"{array}_2")
    deadline = time.monotonic() + 300
    while not (out / "dataset.json").exists():
        assert time.monotonic() < deadline, "\n".join([
            cluster.ask("scontrol", "show", "job", joining), *(log.read_text() for log in tmp_path.glob("*.log"))])
        time.sleep(0.5)
    assert contents(out) == contents(tmp_path / "expected")


def test_what_the_script_refuses():
    refused = ((["corpus"], "the first argument is the number of parts"), (["3", "corpus"], "--out: required"))
    for words, said in refused:
        done = subprocess.run(["bash", "slurm/prepare_data.sh", *words], cwd=ROOT, capture_output=True, text=True,
                              check=False)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
