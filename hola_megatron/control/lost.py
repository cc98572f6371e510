"""Errors of communication between ranks: code 76, not a traceback."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from hola_megatron.errors import LostError

# gloo raises plain RuntimeErrors, whose text contains its source file or one of these
_OF_COMMUNICATION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket timeout|timed out waiting|"
    r"wait timeout after", re.IGNORECASE)


def is_of_communication(error: BaseException) -> bool:
    """Whether a collective or the store failed because of the connection or another rank."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and _OF_COMMUNICATION.search(str(error)) is not None


def in_short(error: BaseException) -> str:
    """The error's first line without the path of torch's own source."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+\]\s*", "", first)[:200]


@contextlib.contextmanager
def lost_contact_named(folder: Path) -> Iterator[None]:
    """Turn communication errors before and after the training loop into LostError (the loop also names the rank)."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_communication(error):
            raise
        raise LostError(f"{folder}: the ranks lost contact outside the training loop ({in_short(error)}); the log of "
                        "each rank may have more, start the same command again") from None
