"""Imported first by every entry point: makes other packages' imports quiet, and safe.

Megatron-core warns of every package a run does not need; what a user must know is in our own
banner, which lists the implementations in use and why. And a script in tools/ has that folder
first on its path, where tools/profile.py would hide the standard library's `profile`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

if os.path.basename(sys.path[0]) == "tools" and os.path.exists(os.path.join(sys.path[0], "profile.py")):
    sys.path.pop(0)
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", message=r".*full scope is deprecated.*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library tells when it starts and stops
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
if not os.environ.get("CUDA_VISIBLE_DEVICES") and not os.path.exists("/dev/nvidia0"):
    # jit_fuser is torch.compile: on a machine without a GPU it costs minutes and gains nothing
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _open_closed_streams() -> None:
    """Reopen closed standard streams: the next opened file would get their number and receive printed text."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


_open_closed_streams()
