"""Softmax attention of all documents of a row in one call: torch's flash attention for sequences of varying lengths.

Nothing is read on the host: the kernel takes the cumulative lengths on the device, and an upper bound of the documents'
lengths sizes its grid. So the call can be part of a CUDA graph, whose last documents may be empty. Grouped key heads
and windows are the kernel's own. Its backward pass adds dq in no fixed order: the same bits come out only by chance.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor

from hola_kernels.memo import memoise
from hola_kernels.packed import PackedDocuments
from hola_kernels.segments import rows_as_segments

WIDEST, WIDEST_SMALL = 256, 192  # widths of a head; the latter where a multiprocessor has less shared memory
SMALL = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))  # compute capabilities


def flash_refusal(q: Tensor, v: Tensor) -> str | None:
    """Why flash attention does not take these tensors, or None. Reads nothing from the device."""
    if not q.is_cuda:
        return f"device {q.device.type}"
    if torch.version.hip is not None:
        return "ROCm is not tested"
    return _of_kind(q.device.index, q.dtype, q.shape[-1], v.shape[-1])


@functools.cache
def _of_kind(index: int, dtype: torch.dtype, key: int, value: int) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention takes 16 bits, not {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    most = WIDEST_SMALL if capability in SMALL else WIDEST
    if key != value or key % 8 or key > most:
        return f"heads of {key} and {value} are not equal multiples of 8 up to {most}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None or "window_size" not in _parameters():
        return f"torch {torch.__version__} has no attention over documents with a window, 2.11 has"
    return None


@functools.cache
def _parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def attend_flash(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, documents: PackedDocuments | None, earlier: int,
                 window: int | None) -> Tensor:
    """o [B, S, H, V]; the last query of every document sees its last key."""
    from torch.nn.attention.varlen import varlen_attn  # on first use: it imports the compiler

    rows, queries = q_BSHK.shape[:2]
    bounds, key_bounds, longest = _bounds(documents, rows, queries, earlier, q_BSHK.device)
    how: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if q_BSHK.shape[2] != k_BTGK.shape[2] and "enable_gqa" in _parameters():  # torch 2.11 takes groups unasked
        how["enable_gqa"] = True
    q, k, v = (x.flatten(0, 1) for x in (q_BSHK, k_BTGK, v_BTGV))
    return varlen_attn(q, k, v, bounds, key_bounds, longest, longest + earlier, **how).unflatten(0, (rows, queries))


def _bounds(documents: PackedDocuments | None, rows: int, queries: int, earlier: int,
            device: torch.device) -> tuple[Tensor, Tensor, int]:
    """(cumulative lengths of queries, of keys [N + 1] int32 on the device, most queries of a document)."""
    if documents is None:
        bounds, longest = rows_as_segments(rows, queries, device), queries
        key_bounds = rows_as_segments(rows, queries + earlier, device)
        return _int32_bounds(bounds, 0), _int32_bounds(key_bounds, 0), longest
    bounds = documents.on(device)
    return _int32_bounds(bounds, 0), _int32_bounds(bounds, earlier), documents.longest


def _int32_bounds(bounds: Tensor, earlier: int) -> Tensor:
    """int32, of the first document that is not empty `earlier` tokens more."""
    def make() -> Tensor:
        return torch.where(bounds > 0, bounds + earlier, 0).to(torch.int32)

    return memoise(bounds, ("int32", earlier), make)
