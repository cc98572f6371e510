"""Marks for code that waits for other ranks, so that the watchdog can tell a rank that hangs from one that waits.

    with waiting_for_ranks():              # or as a decorator of a function
        norm = float(total_norm)           # copies a collective's result from the device

Only the main thread is tracked. torch's own collectives need no mark: their module is on the stack.
"""

from __future__ import annotations

import functools
import sys
import threading
from contextlib import ContextDecorator
from typing import Any

import torch.distributed as dist

_DECLARED = "_waits_for_ranks"
_depth = 0


class waiting_for_ranks(ContextDecorator):
    """Context manager and decorator: the code inside may wait for other ranks."""

    def __enter__(self) -> None:
        self._change(1)

    def __exit__(self, *error: object) -> None:
        self._change(-1)

    @staticmethod
    def _change(by: int) -> None:
        global _depth
        if threading.current_thread() is threading.main_thread():
            _depth += by


def main_thread_waits() -> bool:
    """Whether the main thread is inside `waiting_for_ranks` or a collective of torch."""
    if _depth > 0:
        return True
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        if frame.f_globals is dist.distributed_c10d.__dict__:
            return True
        frame = frame.f_back
    return False


def declare(owner: Any, *names: str) -> None:
    """Wrap functions of another package in `waiting_for_ranks`. Raises AttributeError if `owner` lacks one."""
    for name in names:
        inner = getattr(owner, name)
        if not hasattr(inner, _DECLARED):
            outer = functools.wraps(inner)(waiting_for_ranks()(inner))
            setattr(outer, _DECLARED, True)
            setattr(owner, name, outer)


def declare_megatron() -> None:
    """Wrap functions of Megatron-core that wait by a handle: torch is not on the stack there."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    declare(P2PCommunicator, "_communicate")
    declare(_ParamAndGradBucketGroup, "finish_param_sync", "finish_grad_sync")
