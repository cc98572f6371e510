"""What ends a run from outside, and what only seems to: signals, suspension, a lost launcher, lost connections."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Finished, _rank, metric_rows, rank_server, run_program, run_ranks, small_recipe
from train.faults import install_named
from train.quick_launch import QuickLauncher

from hola_megatron.checkpoint import writer
from hola_megatron.checkpoint.folder import newest_usable
from hola_megatron.control import heartbeat, launcher_watch

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("fault", "name"), [("ctrl_c@2", "SIGINT"), ("hangup@2", "SIGHUP")])
def test_a_signal_saves_and_says_how_to_go_on(fault, name, text_data, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=9)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1, before=partial(install_named, fault))
    assert done.code == 75 and "Traceback" not in done.output, done.output[-3000:]
    assert f"stopped by {name} at step 2, checkpoint saved; start the same command again" in done.output
    assert newest_usable(tmp_path / "run/checkpoints")[0].step == 2
    assert ("Ctrl-C once more ends at once" in done.output) == (name == "SIGINT")


def test_the_second_ctrl_c_needs_no_step_to_end(text_data, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=9)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1, before=_two_ctrl_c)
    assert done.code == -signal.SIGINT, done.output[-3000:]
    assert newest_usable(tmp_path / "run/checkpoints")[0] is None


def test_hangup_stays_ignored_where_it_was(text_data, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=3)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1, before=_ignored_hangup)
    assert done.code == 0 and "finished: 3 steps" in done.output, done.output[-3000:]


def _two_ctrl_c() -> None:
    install_named("ctrl_c@2+")  # one in each step; the second step ends the process
    from hola_megatron.train.loop import Run

    Run.check_signals_and_save = lambda run: None  # the loop does not get to act on the first


def _ignored_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    install_named("hangup@2")


def start_ranks(recipe: Path, log: Path, ranks: int, before: Callable[[], None] | None = None) -> list[BaseProcess]:
    """As helpers.run_ranks, without waiting."""
    context, port = rank_server()
    log.write_text("")
    processes = [context.Process(target=_rank, args=([str(recipe)], log, rank, ranks, port, before))
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def until(condition: Callable[[], Any], what: str, log: Path, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{log.read_text()[-3000:]}"
        time.sleep(0.1)


def steps_made(run: Path) -> int:
    return len(metric_rows(run)) if (run / "metrics.jsonl").exists() else 0


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_suspended_run_goes_on(text_data, tmp_path):
    """Longer than hang_seconds, as by `scontrol suspend`."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(run), train__steps=100_000,
                          parallel__hang_seconds=4, checkpoint__every=100_000)
    ranks = start_ranks(recipe, log, 2)
    try:
        until(lambda: steps_made(run) >= 3, "three steps", log)
        for number, pause in ((signal.SIGSTOP, 8), (signal.SIGCONT, 0)):
            for rank in ranks:
                os.kill(rank.pid, number)
            time.sleep(pause)
        made = steps_made(run)
        until(lambda: steps_made(run) > made + 20 or not ranks[0].is_alive(), "twenty more steps", log)
        os.kill(ranks[0].pid, signal.SIGTERM)
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [75, 75], log.read_text()[-3000:]
    finally:
        for rank in ranks:
            rank.kill()


def test_a_launcher_that_dies_while_the_rank_ends_is_no_traceback(monkeypatch):
    """The interpreter starts no threads any more: the run has been saved, the rank ends by itself."""
    watch, ended = launcher_watch.LauncherWatch(), []

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(launcher_watch.threading.Thread, "start", refuse)
    monkeypatch.setattr(launcher_watch.os, "_exit", ended.append)
    watch._watch(os.getppid() + 1)
    assert ended == [76] and "died" in watch.lost


@pytest.mark.parametrize("launcher", ["ours", pytest.param("torchrun", marks=pytest.mark.long)])
def test_ranks_save_and_end_when_their_launcher_is_killed(launcher, text_data, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(run), train__steps=100_000,
                          checkpoint__every=100_000)
    words = ["--nproc-per-node", "2", "-m", "hola_megatron.train", str(recipe)]
    if launcher == "ours":
        process = QuickLauncher(words, log, patient=False)
    else:
        with log.open("w") as output:
            process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", *words],
                                       stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
    ranks: list[int] = []
    try:
        until(lambda: steps_made(run) >= 3, "three steps", log)
        ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(ranks) == 2
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not any(map(lives, ranks)), "the ranks have ended", log, 90)
    finally:
        for pid in [process.pid, *ranks]:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
    said = log.read_text()
    assert "LostError" in said and f"the launcher of this rank (process {process.pid}) died; a checkpoint of" in said
    assert newest_usable(run / "checkpoints")[0].step >= 3 and "Traceback" not in said


def test_a_rank_that_has_not_begun_ends_with_its_launcher(tmp_path):
    rank = "import time; from hola_megatron.control.launcher_watch import LAUNCHER; LAUNCHER.start(); " \
           "print('started', flush=True); time.sleep(300)"
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {rank!r}]).wait()"
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", launcher], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
                                   env={**os.environ, "TORCHELASTIC_RUN_ID": "1"}, start_new_session=True)
    until(lambda: "started" in log.read_text(), "the rank has started", log)
    (pid,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    process.kill()
    process.wait()
    until(lambda: not lives(pid), "the rank has ended", log, 60)
    assert "died before training began; nothing is lost" in log.read_text()


def test_a_store_that_no_longer_answers_ends_the_ranks_of_other_nodes(text_data, tmp_path):
    """Rank 0 keeps the store here and is stopped: like a node that is gone without a word."""
    log = tmp_path / "log.txt"
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"),
                          train__steps=100_000, checkpoint__every=2)
    ranks = start_ranks(recipe, log, 2, _on_another_node)
    try:
        ranks[1].join(120)
        said = log.read_text()
        assert ranks[1].exitcode == 76 and "the job's store cannot be reached" in said, said[-3000:]
        assert "the ranks could not save" in said and "start the same command again" in said
    finally:
        for rank in ranks:
            rank.kill()


def _on_another_node() -> None:
    os.environ["GROUP_RANK"] = os.environ["RANK"]
    heartbeat.ANSWER_SECONDS, launcher_watch.GRACE_SECONDS = 3.0, 3.0
    install_named("stopped@4@0")


def test_lost_connections_between_living_ranks_are_76(text_data, tmp_path):
    """A gloo timeout: rank 1 comes too late to a collective."""
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=50,
                          parallel__timeout_minutes=0.15, checkpoint={"every": 2, "background": False})
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=2, before=partial(install_named, "late@6@1"))
    assert done.code == 76 and "Traceback" not in done.output, done.output[-3000:]
    assert "LostError" in done.output and "lost their connections after step 5" in done.output
    assert "to go on from" in done.output and "checkpoints/step_0000000" in done.output


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"distributed_optimizer": False}],
                         ids=lambda layout: next(iter(layout)))
def test_in_every_layout_the_waiting_rank_is_known_to_wait(layout, text_data, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=50,
                          parallel={**layout, "hang_seconds": 5}, checkpoint__every=100)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=2, before=partial(install_named, "hang@3@1"))
    assert done.code == 76 and "hangs in hang (faults.py:" in done.output, done.output[-3000:]
    assert "rank 1" in done.output.split("hangs in")[0][-40:] and "rank 0 waits in" in done.output


def test_a_writer_that_blocks_is_told_and_ends_the_run(text_data, tmp_path):
    """On rank 1, from the second checkpoint on; there is no other limit."""
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"),
                          train__steps=100_000, parallel__hang_seconds=None,
                          checkpoint={"every": 2, "write_seconds": 8})
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=2, before=_second_write_blocks)
    assert done.code == 76 and "Traceback" not in done.output, done.output[-3000:]
    assert done.output.count("slow to save |") == 1 and done.output.count("LostError") == 1
    assert "no report of rank 1 in" in done.output and "write_seconds" in done.output
    assert "go on from" in done.output and "checkpoints/step_00000002" in done.output


def test_a_report_that_vanishes_ends_the_run_also_at_a_signal(text_data, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"),
                          train__steps=100_000, checkpoint={"every": 100_000, "write_seconds": 6})
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=2, before=_report_vanishes)
    assert done.code == 76 and "Traceback" not in done.output, done.output[-3000:]
    assert "no report of rank 1 in" in done.output and "has no checkpoint yet" in done.output


def _second_write_blocks() -> None:
    calls, original = [], writer.save_file

    def save_file(*args: Any) -> None:
        calls.append(args)
        if os.environ["RANK"] == "1" and len(calls) > 2:  # weights and optimizer are two files
            os.read(os.pipe()[0], 1)
        original(*args)
    writer.save_file = save_file


def _report_vanishes() -> None:
    install_named("interrupt@3@0")
    original = writer.write_durably

    def write_durably(path: Path, data: bytes) -> None:
        if path.name != "rank-00001.json":
            original(path, data)
    writer.write_durably = write_durably


NO_FOLDER_SYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
int fsync(int number) {
    struct stat about;
    if (fstat(number, &about) == 0 && S_ISDIR(about.st_mode)) { errno = EINVAL; return -1; }
    return ((int (*)(int)) dlsym(RTLD_NEXT, "fsync"))(number);
}
"""


def assert_told_that_folders_cannot_be_synced(done: Finished, run: Path) -> None:
    assert done.code == 0 and "Traceback" not in done.output, done.output[-3000:]
    assert done.output.count("this file system cannot sync a folder (Invalid argument)") == 1
    assert newest_usable(run / "checkpoints")[0].step == 4


def _no_folder_sync() -> None:
    original = os.fsync

    def fsync(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        original(number)
    os.fsync = fsync


def test_a_file_system_that_cannot_sync_a_folder_is_told_at_the_start(text_data, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=4,
                          checkpoint__every=2)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1, before=_no_folder_sync)
    assert_told_that_folders_cannot_be_synced(done, tmp_path / "run")


@pytest.mark.long
def test_a_real_program_on_a_file_system_that_cannot_sync_a_folder(text_data, tmp_path):
    """As some FUSE file systems: the C library's fsync answers EINVAL for folders."""
    source, library, log = tmp_path / "sync.c", tmp_path / "sync.so", tmp_path / "log.txt"
    source.write_text(NO_FOLDER_SYNC)
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=4,
                          checkpoint__every=2)
    done = run_program(["-m", "hola_megatron.train", str(recipe)], log, environment={"LD_PRELOAD": str(library)})
    assert_told_that_folders_cannot_be_synced(done, tmp_path / "run")


@pytest.mark.parametrize(("fault", "said"), [
    ("moved@4", "the run folder was moved to"), ("removed@4", "the run folder is not there any more")])
def test_a_run_folder_that_is_moved_does_not_become_two(fault, said, text_data, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=9,
                          checkpoint__every=2, checkpoint__background=False)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=2, before=partial(install_named, f"{fault}@0"))
    assert done.code == 2 and said in done.output and "Traceback" not in done.output, done.output[-3000:]
    assert not (tmp_path / "run").exists()
    if fault == "moved@4":
        assert newest_usable(tmp_path / "run-moved/checkpoints")[0].step == 4
        assert "step 4 is saved there" in done.output
