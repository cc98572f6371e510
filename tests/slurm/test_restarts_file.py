"""The file in which a batch script counts its restarts: whatever it holds, nothing of it is run."""

from __future__ import annotations

import subprocess

import pytest
from helpers import ROOT

FUNCTIONS = (ROOT / "slurm/common.sh").read_text().removesuffix('main "$@"\n')


@pytest.mark.parametrize(("text", "counted", "flags"), [
    ("-1 2 new\n", "-1 3 new", "--new"), ("-1 08 \n", "-1 9 ", ""), ("a[$(touch HERE)] 1 \n", "-1 1 ", ""),
    ("-1 a[$(touch HERE)] \n", "-1 1 ", ""), ("-1 1 other words\n", "-1 1 ", ""), ("\0\n", "-1 1 ", ""),
    ("", "-1 1 ", "")])
def test_a_damaged_file_starts_the_count_again(text, counted, flags, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "slurm_restarts").write_text(text.replace("HERE", str(tmp_path / "ran")))
    asked = "asked_new=yes" if "new" in text else ""
    program = (f"RECIPE=r.yaml RANKS_PER_NODE=1 SLURM_JOB_NUM_NODES=1\n{FUNCTIONS}\nrun={run} restarts=1 "
               f"max_restarts=50 {asked}\ncount_restart\n" 'echo "flags ${flags[*]-}"')
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run / "slurm_restarts").read_text() == counted + "\n", done.stderr
    assert done.stdout.splitlines()[-1] == f"flags {flags}"
    assert not (tmp_path / "ran").exists()
    assert "expected" not in done.stderr and "syntax" not in done.stderr
