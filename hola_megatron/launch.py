"""torchrun that keeps the exit code, lets the ranks save on a stop signal, and prints no traceback.

    python -m hola_megatron.launch --nproc-per-node 8 -m hola_megatron.train RECIPE ...

Takes torchrun's arguments. torchrun itself answers every failure with code 1 and a traceback
of its own; a scheduler needs to tell a bad recipe (2) from a run to queue again (75, or 76 when a rank died).
torchrun dies of SIGUSR1, and after SIGTERM gives the ranks 30 seconds; here SIGTERM, SIGUSR1 and SIGHUP are handed to
every rank of this machine, which save and end with 75. SIGHUP stays ignored where it was ignored (nohup). The first
Ctrl-C (SIGINT) does the same as SIGTERM, a second one kills the ranks and ends with 130. A rank that has saved and
left does not hurry the others. Ranks that have not ended HOLA_STOP_SECONDS (600) after the first signal are killed.

When a rank fails, the others get FAILED_SECONDS to end by themselves; one that is stopped (SIGSTOP) is killed at once.

On several nodes one rank may find what no restart mends (codes 2, 3, 4), and the others then lose it (76). The node
that found it writes its code to the file HOLA_EXIT_FILE, if that is set, for the script that has all nodes' codes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from hola_megatron.arguments import Parser, environment_number, positive, whole
from hola_megatron.errors import (
    EXIT_DATA,
    EXIT_DIVERGED,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_RECIPE,
    RecipeError,
    one_line,
    shown,
)
from hola_megatron.startup.world import refuse_several_launchers

# torch is imported inside `launch`: it takes seconds, and a signal must not find us without a handler

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# nohup ignores SIGHUP; a shell without job control starts background jobs with SIGINT ignored
LEFT_IGNORED = (signal.SIGHUP, signal.SIGINT)
AGAIN_SECONDS = 10
FAILED_SECONDS = 8  # torch gives 30; survivors need a few to name the lost rank
EXIT_AT_ONCE = 128 + signal.SIGINT
NO_RESTART = (EXIT_RECIPE, EXIT_DATA, EXIT_DIVERGED)


class Stop:
    """Hands signals to the ranks as often as they come: a scheduler may send several, or one twice."""

    def __init__(self, grace_seconds: float):
        self.received: signal.Signals | None = None
        self.ranks_killed = self.at_once = False
        self.grace_seconds = grace_seconds
        self._busy = False
        for number in STOP_SIGNALS:
            if number not in LEFT_IGNORED or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            self._end_at_once()
            return
        if self.received is None:
            self.received = signal.Signals(number)
            if number == signal.SIGINT:
                log("SIGINT: the ranks save and end; Ctrl-C once more ends them at once, with nothing saved")
            threading.Thread(target=self._insist, daemon=True).start()
        if self._busy:  # a signal during the handling of another one
            return
        self._busy = True
        count = _signal_children(_as_sent(number))
        self._busy = False
        if count == 0:
            sys.exit(_outside_training(self.received))

    def _end_at_once(self) -> None:
        self.ranks_killed = self.at_once = True
        if _signal_children(signal.SIGKILL) == 0:
            sys.exit(EXIT_AT_ONCE)

    def _insist(self) -> None:
        """Repeat the signal, for ranks that are just being started; at the end kill them."""
        end = time.monotonic() + self.grace_seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(AGAIN_SECONDS, left))
            _signal_children(_as_sent(self.received))
        self.ranks_killed = True
        log(f"ranks still run {self.grace_seconds:g} s after {self.received.name} (HOLA_STOP_SECONDS); killing them")
        _signal_children(signal.SIGKILL)


def log(text: str) -> None:
    """Print to stderr; a closed or full one changes no exit code."""
    with contextlib.suppress(OSError, ValueError):
        print(f"launch: {text}", file=sys.stderr, flush=True)


def _as_sent(number: int) -> int:
    """Ctrl-C goes to the ranks as SIGTERM: a second SIGINT would end a rank, and this is sent repeatedly."""
    return signal.SIGTERM if number == signal.SIGINT else number


def _signal_children(number: int) -> int:
    """Send a signal to every child of this process, which are the ranks; returns how many there are."""
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid():
                os.kill(int(stat.parent.name), number)
                count += 1
        except (OSError, IndexError):  # it ended meanwhile
            continue
    return count


def launch(argv: list[str]) -> int:
    """Start the workers, wait, and return the code of the first that failed (0 if none did)."""
    try:
        stop = Stop(environment_number("HOLA_STOP_SECONDS", "600", positive))
    except RecipeError as error:
        log(str(error))
        return EXIT_RECIPE
    import logging

    # C++ warnings that peers have left, which they do when they are done; read when torch is imported
    chosen = "TORCH_CPP_LOG_LEVEL" in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    if not chosen:  # the ranks keep theirs
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        config, command, arguments = _configured(argv)
    except RecipeError as error:
        log(str(error))
        return EXIT_RECIPE
    config.signals_to_handle = "SIGQUIT"  # torchrun's own, less those that `stop` takes
    _let_ranks_end_by_themselves(stop)
    try:
        elastic_launch(config, command)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = _code_of(rank, failure.exitcode, stop)
        if code in NO_RESTART and "HOLA_EXIT_FILE" in os.environ:
            _write_exit_code(Path(os.environ["HOLA_EXIT_FILE"]), code)
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousError as error:
        if stop.received:  # the node that keeps the store has saved and left a moment before us
            return EXIT_INTERRUPTED
        log(f"no contact with the other nodes at {config.rdzv_endpoint} ({error}); see the log of the first of them")
        return 1
    return 0


def _configured(argv: list[str]) -> tuple[Any, Any, list[str]]:
    """torchrun's configuration, command and its arguments; RecipeError where torchrun cannot use what it is given."""
    from torch.distributed.run import config_from_args, get_args_parser

    parser = get_args_parser()
    parser.error = partial(Parser.error, parser)
    args = parser.parse_args(argv)
    refuse_several_launchers(args.nnodes, args.standalone)
    if args.nproc_per_node not in ("auto", "cpu", "gpu", "xpu"):
        try:
            whole(1, 4096)(args.nproc_per_node)
        except argparse.ArgumentTypeError as error:
            raise RecipeError(f"--nproc-per-node: {error}") from None
    default_port = parser.parse_args(["script"]).master_port  # None or 29500, as torch has it
    unchanged = args.master_port == default_port
    if unchanged and args.rdzv_backend == "static" and args.nnodes in ("1", "1:1"):
        # one machine and no address given: any free port, so that two runs do not collide
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    try:
        return config_from_args(args)
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        given = ", ".join(f"--{name.replace('_', '-')} {shown(getattr(args, name))}"
                          for name in ("nnodes", "nproc_per_node", "rdzv_endpoint", "rdzv_conf"))
        raise RecipeError(f"torchrun cannot use {given} ({one_line(error)})") from None


def _let_ranks_end_by_themselves(stop: Stop) -> None:
    """When one rank ends with an error, torch sends SIGTERM to the others and SIGKILL 30 s later; it has no setting.

    Ranks that save get no further signal: they have until HOLA_STOP_SECONDS. In any other case the time is shorter.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    torch_close = SubprocessContext._close

    def close(context: SubprocessContext, death_sig: signal.Signals, timeout: int = 30) -> None:
        ranks = [handler.proc for handler in context.subprocess_handlers.values()]
        end = time.monotonic() + stop.grace_seconds
        while _all_saving(ranks, stop) and time.monotonic() < end:
            time.sleep(0.1)
        for rank in ranks:
            if rank.poll() is None and _is_stopped(rank.pid):  # it can take no signal but this one
                rank.kill()
        torch_close(context, death_sig, FAILED_SECONDS)

    if getattr(torch_close, "__module__", None) == __name__:  # already ours: a second launch in one process
        return
    SubprocessContext._close = close


def _all_saving(ranks: list[subprocess.Popen], stop: Stop) -> bool:
    """Whether some ranks still run, and the others ended because of the stop signal."""
    codes = [rank.poll() for rank in ranks]
    ended = [code for code in codes if code is not None]
    received = stop.received is not None or EXIT_INTERRUPTED in ended
    return received and not stop.ranks_killed and None in codes and set(ended) <= {0, EXIT_INTERRUPTED}


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    except (OSError, IndexError):  # it ended meanwhile
        return False


def _write_exit_code(file: Path, code: int) -> None:
    try:
        file.write_text(f"{code}\n")
    except OSError as error:  # the code itself must not be lost
        log(f"HOLA_EXIT_FILE: {file} cannot be written ({error})")


def _code_of(rank: int, code: int, stop: Stop) -> int:
    if stop.at_once:
        return EXIT_AT_ONCE
    if code >= 0:
        return code
    if stop.received and -code in STOP_SIGNALS and not stop.ranks_killed:
        return _outside_training(stop.received)
    log(f"rank {rank} was ended by {signal.Signals(-code).name}")
    return 128 - code if stop.ranks_killed else EXIT_LOST


def _outside_training(received: signal.Signals) -> int:
    """The exit code where no rank handles the signal: training has not started or has finished."""
    log(f"stopped by {received.name} outside the training loop; nothing is lost")
    return EXIT_INTERRUPTED


if __name__ == "__main__":
    try:
        code = launch(sys.argv[1:])
    except RecipeError as error:
        print(f"RecipeError: {error}", file=sys.stderr, flush=True)
        code = EXIT_RECIPE
    finally:
        for number in STOP_SIGNALS:  # Python removes its handlers at exit: the next signal would kill this process
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
