"""A data error of one rank is raised on all ranks, so that they save and end together."""

from __future__ import annotations

import torch.distributed as dist

from hola_megatron.errors import DataError


def first_of_all_ranks(mine: DataError | None) -> DataError:
    """The error of the lowest rank that has one, the same on every rank. A collective; some rank must have one."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if mine is None else str(mine))
    return DataError(next(text for text in messages if text is not None))
