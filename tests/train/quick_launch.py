"""hola_megatron.launch, but a rank that does not end when it is told to is killed after 3 seconds.

torch gives it 30, and has no setting for the case that another rank has failed.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from hola_megatron.launch import launch

SECONDS = 3
original_close = SubprocessContext._close


def close(context: SubprocessContext, death_sig: signal.Signals, timeout: int = 30) -> None:
    original_close(context, death_sig, min(timeout, SECONDS))


if __name__ == "__main__":
    SubprocessContext._close = close
    sys.exit(launch(sys.argv[1:]))
