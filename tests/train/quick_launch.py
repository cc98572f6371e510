"""hola_megatron.launch without what costs time: ranks are forked, and one that does not end is not waited for.

A rank is a child of the launcher as ever, in a session of its own, with the same arguments and variables; what a fresh
interpreter would import, the launcher has imported (tests/preloaded.py, by `helpers.rank_server`). And a rank that does
not end when it is told to is killed after 3 seconds: torch gives it 30, and has no setting for the case that another
rank has failed.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from helpers import ROOT, Finished, rank_server
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from hola_megatron.launch import STOP_SIGNALS, launch

SECONDS = 3
original_close = SubprocessContext._close


def launch_quickly(arguments: list[str], log: Path, *, ranks: int, timeout: float = 300) -> Finished:
    """`python -m hola_megatron.launch --nproc-per-node ranks arguments...`, to its end."""
    context, _ = rank_server()
    process = context.Process(target=_launch, args=(["--nproc-per-node", str(ranks), *arguments], log))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"no end within {timeout} s:\n{log.read_text()[-3000:]}")
    return Finished(process.exitcode, log.read_text(errors="replace"))


class QuickLauncher:
    """A forked launcher with the methods of subprocess.Popen; patient: torch's and our launcher's times are left."""

    def __init__(self, arguments: list[str], log: Path, *, ignored: tuple[signal.Signals, ...] = (),
                 patient: bool = True, **environment: str):
        log.touch()
        self._process = rank_server()[0].Process(target=_launch, args=(arguments, log, ignored, patient, environment))
        self._process.start()
        self.pid = self._process.pid

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("launch", timeout)
        return self.poll()


def _launch(arguments: list[str], log: Path, ignored: tuple[signal.Signals, ...] = (), patient: bool = False,
            environment: dict[str, str] | None = None) -> None:
    assert "preloaded" in sys.modules, "the fork server failed to import tests/preloaded.py, silently as is its way"
    os.setsid()
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(ROOT)
    os.environ.update(TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1", **(environment or {}))
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if not patient:
        SubprocessContext._close = _close
    subprocess_handler.Popen = ForkedRank
    code = launch(arguments)
    os._exit(code)


def _close(context: SubprocessContext, death_sig: signal.Signals, timeout: int = 30) -> None:
    original_close(context, death_sig, min(timeout, SECONDS))


class ForkedRank(subprocess.Popen):
    """`python -u [-m] PROGRAM arguments...` in a fork of this process."""

    def _execute_child(self, args: tuple[str, ...], executable: None, preexec_fn: None, close_fds: bool,
                       pass_fds: tuple[int, ...], cwd: None, env: dict[str, str], *_: object) -> None:
        self.pid = os.fork()
        self._child_created = True
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            os.environ.clear()
            os.environ.update(env)
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is signal.SIG_IGN:  # a new program inherits that
                    continue
                signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
            code = _run_python(args[1:])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def fork_program(arguments: list[str], log: Path, timeout: float = 300) -> Finished:
    """`python arguments...` in a fork of a process with everything imported, to its end."""
    log.touch()
    process = rank_server()[0].Process(target=_program, args=(arguments, log))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"no end within {timeout} s:\n{log.read_text()[-3000:]}")
    return Finished(process.exitcode, log.read_text(errors="replace"))


def _program(arguments: list[str], log: Path) -> None:
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(ROOT)
    sys.exit(_run_python(arguments))


def _run_python(arguments: list[str]) -> int:
    """What `python arguments...` does; returns its exit code."""
    words = [word for word in arguments if word != "-u"]
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    run = runpy.run_module if is_module else runpy.run_path
    try:
        run(sys.argv[0], run_name="__main__", **({"alter_sys": True} if is_module else {}))
    except SystemExit as ended:
        return ended.code or 0
    return 0
