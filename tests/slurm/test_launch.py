"""The launcher and signals, with ranks that are small scripts: who gets the signal, and what code comes out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.distributed

SAVES = """
import signal, sys, time
def save(number, frame):
    time.sleep(1)       # longer than the launcher's polling
    open(sys.argv[1] + "/saved-" + __import__("os").environ["RANK"], "w").write(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
"""
ENDS_AT_ONCE = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(75))
"""
NO_HANDLER = "import sys, time\n"
DEAF = "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
WAITS = """
import os
launcher = os.getppid()
open(sys.argv[1] + "/ready-" + os.environ["RANK"], "w").close()
while os.getppid() == launcher:     # a failed test leaves nothing behind
    time.sleep(0.2)
"""


def start(folder: Path, rank: str, **environment: str) -> subprocess.Popen:
    script = folder / "rank.py"
    script.write_text(rank + WAITS)
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hola_megatron.launch", "--nproc-per-node", "2", str(script), str(folder)],
            stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True)


def end(process: subprocess.Popen, folder: Path) -> tuple[int, str]:
    try:
        return process.wait(40), (folder / "log.txt").read_text()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"the launcher did not end\n{(folder / 'log.txt').read_text()}") from None


def wait_for_ranks(process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob("ready-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_every_rank_gets_the_signal_and_time_to_save(number, tmp_path):
    process = start(tmp_path, SAVES)
    wait_for_ranks(process, tmp_path)
    process.send_signal(number)
    code, said = end(process, tmp_path)
    assert code == 75 and said == ""
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2


def test_a_second_signal_does_not_cut_saving_short(tmp_path):
    process = start(tmp_path, SAVES)
    wait_for_ranks(process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)  # both orders of arrival are right; this makes it the middle of saving
    process.send_signal(signal.SIGTERM)
    assert end(process, tmp_path)[0] == 75
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))


def test_signals_up_to_the_end_do_not_change_the_code(tmp_path):
    process = start(tmp_path, ENDS_AT_ONCE)
    wait_for_ranks(process, tmp_path)
    deadline = time.monotonic() + 40
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.005)
    assert end(process, tmp_path)[0] == 75


def test_ranks_that_do_not_listen_yet_have_nothing_to_lose(tmp_path):
    process = start(tmp_path, NO_HANDLER)
    wait_for_ranks(process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    code, said = end(process, tmp_path)
    assert code == 75 and "stopped by SIGUSR1 outside the training loop" in said


def test_a_signal_before_there_are_ranks(tmp_path):
    process = start(tmp_path, NO_HANDLER)
    watched = 1 << (signal.SIGUSR1 - 1)
    deadline = time.monotonic() + 30
    while True:  # until the launcher listens, which is before torch is imported
        caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
        if int(caught, 16) & watched:
            break
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    code, said = end(process, tmp_path)
    assert code == 75 and "outside the training loop" in said
    assert not list(tmp_path.glob("ready-*"))


def test_ranks_that_hang_are_killed_after_the_stated_time(tmp_path):
    process = start(tmp_path, DEAF, HOLA_STOP_SECONDS="1")
    wait_for_ranks(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    code, said = end(process, tmp_path)
    assert code == 128 + signal.SIGKILL
    assert "ranks still run 1 s after SIGTERM (HOLA_STOP_SECONDS); killing them" in said
