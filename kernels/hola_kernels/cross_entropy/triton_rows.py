"""One program a row; logits are read once from HBM and written once.

A row (64 KB at 32,000 columns in bf16) is read twice, in blocks of registers: first for the largest logit and the sum
of exponentials, then to write the gradient; the second pass finds the row in L2. For 65,536 rows of 32,000 in bf16:
8.4 GB both ways, 2.0 ms at 4.3 TB/s. Between ranks the two passes are two launches, and the second reads from HBM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.cross_entropy.labels import IGNORE_INDEX
from hola_kernels.integers import next_power_of_2

BLOCK, WARPS = 8192, 8  # 0.90 ms for 21,846 rows of 32,000 in bf16; a row in one block of 32,768: 1.25


@triton.jit
def _row_kernel(x_ptr, label_ptr, weight_ptr, log_sum_ptr, out_ptr, M, V, first, SUM: tl.constexpr,
                GRADIENT: tl.constexpr, WHOLE: tl.constexpr, IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    """SUM: out [3, M] = largest, sum of exp(x - largest), the label's logit. GRADIENT: x <- weight (softmax - one-hot),
    by the row's own sum with SUM, else by log_sum [M].

    WHOLE: these are all columns, so a label outside of them is none: NaN, or with IGNORE a loss of zero."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * V
    given = tl.load(label_ptr + row).to(tl.int64)
    ignored = given == IGNORE
    inside = (given >= first) & (given < first + V)
    label = tl.where(inside, given - first, -1).to(tl.int32)
    if SUM:
        largest = -float("inf")
        total = 0.0
        for begin in tl.range(0, V, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + column, mask=column < V, other=-float("inf")).to(tl.float32)
            new = tl.maximum(largest, tl.max(x, 0))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
            largest = new
        picked = tl.load(x_ptr + tl.where(inside, label, 0)).to(tl.float32)
        tl.store(out_ptr + row, tl.where(WHOLE & ignored, 0.0, largest))
        tl.store(out_ptr + M + row, tl.where(WHOLE & ignored, 1.0, total))
        no_label = tl.where(WHOLE & (ignored == 0), float("nan"), 0.0)
        tl.store(out_ptr + 2 * M + row, tl.where(inside, picked, no_label))
        log_sum = largest + tl.log(total)
    else:
        log_sum = tl.load(log_sum_ptr + row).to(tl.float32)
    if GRADIENT:
        tl.debug_barrier()  # the label's logit has been read before it is overwritten
        weight = tl.where(ignored, 0.0, tl.load(weight_ptr + row).to(tl.float32))
        if WHOLE:
            weight = tl.where(inside | (weight == 0.0), weight, float("nan"))
        for begin in tl.range(0, V, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + column, mask=column < V, other=0.0).to(tl.float32)
            slope = (tl.exp(x - log_sum) - tl.where(column == label, 1.0, 0.0)) * weight
            slope = tl.where(weight != 0.0, slope, 0.0)
            tl.store(x_ptr + column, slope.to(x_ptr.dtype.element_ty), mask=column < V)


def statistics(logits_MV: Tensor, labels_M: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    out = _out(logits_MV)
    _launch(logits_MV, labels_M, None, None, out, first, gradient=False, whole=False)
    return out[0], out[1], out[2]


def gradient_(logits_MV: Tensor, labels_M: Tensor, log_sum_M: Tensor, weight_M: Tensor, first: int) -> Tensor:
    _launch(logits_MV, labels_M, weight_M, log_sum_M, None, first, gradient=True, whole=False)
    return logits_MV


def both_(logits_MV: Tensor, labels_M: Tensor, weight_M: Tensor | None) -> Tensor:
    out = _out(logits_MV)
    _launch(logits_MV, labels_M, weight_M, None, out, 0, gradient=weight_M is not None, whole=True)
    return out[1].log() - (out[2] - out[0])


def _out(logits_MV: Tensor) -> Tensor:
    return torch.empty(3, len(logits_MV), dtype=torch.float32, device=logits_MV.device)


def _launch(logits_MV: Tensor, labels_M: Tensor, weight_M: Tensor | None, log_sum_M: Tensor | None,
            out_3M: Tensor | None, first: int, *, gradient: bool, whole: bool) -> None:
    rows, columns = logits_MV.shape
    if not logits_MV.numel():
        return
    block = min(BLOCK, next_power_of_2(columns))
    unused = logits_MV  # a pointer that the kernel does not follow
    _row_kernel[(rows,)](
        logits_MV, labels_M.contiguous(), unused if weight_M is None else weight_M.contiguous(),
        unused if log_sum_M is None else log_sum_M.contiguous(), unused if out_3M is None else out_3M, rows, columns,
        first, SUM=out_3M is not None, GRADIENT=gradient, WHOLE=whole, IGNORE=IGNORE_INDEX, BLOCK=block,
        num_warps=WARPS)
