"""Milliseconds of a call, with its host or without.

A call of a layer is a few dozen launches, which a slow host makes longer than the device's work: the same call took
3.2 and 3.9 ms minutes apart. Replayed as a CUDA graph it takes what the device needs, ours and theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hola_kernels import recording


def milliseconds(call: Callable[[], Any], *, graph: bool, rep: int = 200,
                 grad_to_none: list[torch.Tensor] | None = None) -> float:
    """Median of repeated calls on cold L2; graph: of replays of one recording of it."""
    import triton

    if not graph:
        return triton.testing.do_bench(call, warmup=50, rep=rep, grad_to_none=grad_to_none, return_mode="median")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for tensor in grad_to_none or ():
                tensor.grad = None
            call()
    torch.cuda.current_stream().wait_stream(stream)
    for tensor in grad_to_none or ():
        tensor.grad = None
    recorded = torch.cuda.CUDAGraph()
    with recording() as tables, torch.cuda.graph(recorded, stream=stream):
        call()
    time = triton.testing.do_bench(recorded.replay, warmup=50, rep=rep, return_mode="median")
    recorded.reset()
    for tensor in grad_to_none or ():
        tensor.grad = None  # it lay in the recording's memory
    del tables
    return time
