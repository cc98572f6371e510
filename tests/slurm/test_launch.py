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
from train.quick_launch import QuickLauncher

pytestmark = pytest.mark.distributed

SAVES = """
import signal, sys, time
def save(number, frame):
    time.sleep(1)       # longer than the launcher's polling
    open(sys.argv[1] + "/saved-" + __import__("os").environ["RANK"], "w").write(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, save)
"""
ONE_SAVES_SLOWLY = """
import os, signal, sys, time
seen = []
def save(number, frame):
    seen.append(signal.Signals(number).name)
    if len(seen) > 1:
        return
    if os.environ["RANK"] == "1":
        deadline = time.monotonic() + 60
        while not os.path.exists(sys.argv[1] + "/saved-0") and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)       # rank 0 has left, and the launcher knows
    open(sys.argv[1] + "/saved-" + os.environ["RANK"], "w").write(" ".join(seen))
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
"""
STOPPED_AND_FAILING = """
import os, signal, sys, time
note = sys.argv[1] + "/pid"
if os.environ["RANK"] == "1":
    with open(note + ".tmp", "w") as file:
        file.write(str(os.getpid()))
    os.rename(note + ".tmp", note)
    os.kill(os.getpid(), signal.SIGSTOP)
while not os.path.exists(note) or ") T " not in open("/proc/%s/stat" % open(note).read()).read():
    time.sleep(0.1)
sys.exit(4)
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


def start(folder: Path, rank: str, *, program: bool = False, ignored: tuple[signal.Signals, ...] = (),
          **environment: str) -> subprocess.Popen | QuickLauncher:
    """program: a real process; else the launcher and its ranks are forked. ignored: as under nohup."""
    script = folder / "rank.py"
    script.write_text(rank + WAITS)
    words, log = ["--nproc-per-node", "2", str(script), str(folder)], folder / "log.txt"
    if not program:
        return QuickLauncher(words, log, ignored=ignored, **environment)
    with log.open("w") as output:
        return subprocess.Popen([sys.executable, "-m", "hola_megatron.launch", *words], stdout=output,
                                stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **environment},
                                start_new_session=True)


def end(process: subprocess.Popen | QuickLauncher, folder: Path) -> tuple[int, str]:
    try:
        return process.wait(40), (folder / "log.txt").read_text()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"the launcher did not end\n{(folder / 'log.txt').read_text()}") from None


def wait_for_ranks(process: subprocess.Popen | QuickLauncher, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob("ready-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_every_rank_gets_the_signal_and_time_to_save(number, tmp_path):
    process = start(tmp_path, SAVES, program=number == signal.SIGTERM)
    wait_for_ranks(process, tmp_path)
    process.send_signal(number)
    code, said = end(process, tmp_path)
    assert code == 75 and said == ""
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2


def test_a_rank_that_has_saved_does_not_hurry_the_others(tmp_path):
    """torch sends SIGTERM to all others when the first rank ends with an error, which 75 is to it."""
    process = start(tmp_path, ONE_SAVES_SLOWLY)
    wait_for_ranks(process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    code, said = end(process, tmp_path)
    assert code == 75 and said == ""
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2


def test_hangup_stays_ignored_under_nohup(tmp_path):
    process = start(tmp_path, SAVES.replace(", signal.SIGHUP", ""), ignored=(signal.SIGHUP,))
    wait_for_ranks(process, tmp_path)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)  # a launcher that took it would hand it on
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert end(process, tmp_path)[0] == 75
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2


def test_the_first_ctrl_c_saves(tmp_path):
    process = start(tmp_path, SAVES)
    wait_for_ranks(process, tmp_path)
    process.send_signal(signal.SIGINT)
    code, said = end(process, tmp_path)
    assert code == 75 and "SIGINT: the ranks save and end; Ctrl-C once more ends them at once" in said
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["SIGTERM"] * 2


def test_the_second_ctrl_c_ends_at_once(tmp_path):
    process = start(tmp_path, DEAF)
    wait_for_ranks(process, tmp_path)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)  # two at the same moment would be one
    assert end(process, tmp_path)[0] == 130


def test_a_stopped_rank_does_not_keep_a_failed_run(tmp_path):
    began = time.monotonic()
    process = start(tmp_path, STOPPED_AND_FAILING)
    assert end(process, tmp_path)[0] == 4
    failed_at = (tmp_path / "pid").stat().st_mtime
    assert time.time() - failed_at < 25 and time.monotonic() - began < 60  # torch waits 30 s for a stopped rank


def test_a_second_signal_does_not_cut_saving_short(tmp_path):
    process = start(tmp_path, SAVES)
    wait_for_ranks(process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)  # both orders of arrival are right; this makes it the middle of saving
    process.send_signal(signal.SIGTERM)
    assert end(process, tmp_path)[0] == 75
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))


def test_signals_up_to_the_end_do_not_change_the_code(tmp_path):
    process = start(tmp_path, ENDS_AT_ONCE, program=True)
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
    process = start(tmp_path, NO_HANDLER, program=True)
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
