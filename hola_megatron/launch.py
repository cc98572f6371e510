"""torchrun that keeps the exit code, lets the ranks save when it is told to stop, and says nothing of its own.

    python -m hola_megatron.launch --nproc-per-node 8 -m hola_megatron.train RECIPE ...

Takes torchrun's arguments. torchrun itself answers every failure with code 1 and a traceback
of its own; a scheduler needs to tell a bad recipe (2) from a run to queue again (75, or 76 when a rank died).
torchrun dies of SIGUSR1, and after SIGTERM gives the ranks 30 seconds; here both are handed to
every rank of this machine, which save and end with 75. Ranks that have not ended
HOLA_STOP_SECONDS (600) after the first signal are killed.

On several nodes one rank may find what no restart mends (codes 2, 3, 4), and the others then lose it (76). The node
that knows writes its code to the file HOLA_EXIT_FILE, if that is set, for the script that has all nodes' codes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
from pathlib import Path
from types import FrameType

from hola_megatron.errors import EXIT_DATA, EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_LOST, EXIT_RECIPE

# torch is imported inside `launch`: it takes seconds, and a signal must not find us without a handler

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGAIN_SECONDS = 10
NO_RESTART = (EXIT_RECIPE, EXIT_DATA, EXIT_DIVERGED)


class Stop:
    """Hands SIGTERM and SIGUSR1 to the ranks as often as they come: a scheduler may send either, or both, twice."""

    def __init__(self, grace_seconds: float):
        self.asked: signal.Signals | None = None
        self.ranks_killed = False
        self._grace_seconds = grace_seconds
        self._busy = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked = signal.Signals(number)
            threading.Thread(target=self._insist, daemon=True).start()
        if self._busy:  # a signal amid our handling of the one before, which is for the same end
            return
        self._busy = True
        count = _signal_children(number)
        self._busy = False
        if count == 0:
            sys.exit(_outside_training(self.asked))

    def _insist(self) -> None:
        """Once more now and then, for a rank that was just being started; in the end by force."""
        end = time.monotonic() + self._grace_seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(AGAIN_SECONDS, left))
            _signal_children(self.asked)
        self.ranks_killed = True
        print(f"launch: ranks still run {self._grace_seconds:g} s after {self.asked.name} (HOLA_STOP_SECONDS); "
              "killing them", file=sys.stderr, flush=True)
        _signal_children(signal.SIGKILL)


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
    stop = Stop(float(os.environ.get("HOLA_STOP_SECONDS", "600")))
    import logging

    # C++ warnings that peers have left, which they do when they are done; read when torch is imported
    chosen = "TORCH_CPP_LOG_LEVEL" in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    if not chosen:  # the ranks keep theirs
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    args = parse_args(argv)
    unchanged = args.master_port == parse_args(["script"]).master_port  # None or 29500, as torch's version has it
    if unchanged and args.rdzv_backend == "static" and args.nnodes in ("1", "1:1"):
        # one machine and no address given: any free port, so that two runs do not collide
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    config, command, arguments = config_from_args(args)
    config.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's own, less those that `stop` takes
    try:
        elastic_launch(config, command)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = _code_of(rank, failure.exitcode, stop)
        if code in NO_RESTART and "HOLA_EXIT_FILE" in os.environ:
            _tell(Path(os.environ["HOLA_EXIT_FILE"]), code)
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousError as error:
        if stop.asked:  # the node that keeps the store has saved and left a moment before us
            return EXIT_INTERRUPTED
        print(f"launch: no contact with the other nodes at {config.rdzv_endpoint} ({error}); see what the first of "
              "them said", file=sys.stderr)
        return 1
    return 0


def _tell(file: Path, code: int) -> None:
    try:
        file.write_text(f"{code}\n")
    except OSError as error:  # the code itself must not be lost
        print(f"launch: HOLA_EXIT_FILE: {file} cannot be written ({error})", file=sys.stderr)


def _code_of(rank: int, code: int, stop: Stop) -> int:
    if code >= 0:
        return code
    if stop.asked and -code in STOP_SIGNALS and not stop.ranks_killed:
        return _outside_training(stop.asked)
    print(f"launch: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
    return 128 - code if stop.ranks_killed else EXIT_LOST


def _outside_training(asked: signal.Signals) -> int:
    """No rank, or one that dies of the signal: it has not begun or has finished, as training takes it itself."""
    print(f"launch: stopped by {asked.name} outside the training loop; nothing is lost", file=sys.stderr)
    return EXIT_INTERRUPTED


if __name__ == "__main__":
    try:
        code = launch(sys.argv[1:])
    finally:
        for number in STOP_SIGNALS:  # Python takes its handlers away while it ends: the next signal would be our death
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
