"""Output projection and cross-entropy a piece of tokens at a time: logits of all tokens are never there at once.

    each piece:  logits = h W^T  ->  losses, and d logits written over them  ->  dh = d logits W, dW += d logits^T h

The gradients are made in the forward pass, while a piece's logits exist, so that no product is computed twice: the mask
says what each loss weighs in the sum that is returned, and backward only multiplies by the gradient of that sum. Over
tensor ranks each holds its rows of W; ranks exchange three numbers a token (softmax_statistics).

M tokens (rows and positions together), D width, V rows of W on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from hola_kernels.cross_entropy import cross_entropy_, cross_entropy_gradient_, softmax_statistics


def summed_loss(*, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, rows: int, group: dist.ProcessGroup,
                sequence_parallel: bool, backend: str = "auto") -> Tensor:
    """Sum of mask * cross-entropy over all tokens, float32 (float64 in a float64 model), the same on all tensor ranks.

    hidden [S, B, D], S cut over the ranks of `group` under sequence parallelism; weight [V, D]: this rank's rows of the
    output projection; labels, mask [B, S]; rows: tokens whose logits are made at once.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    return _SummedLoss.apply(hidden.reshape(-1, hidden.shape[-1]), weight, labels.t().reshape(-1),
                             mask.t().reshape(-1), rows, group, backend, torch.is_grad_enabled())


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, mask_M: Tensor, rows: int,
                group: dist.ProcessGroup, backend: str, learning: bool) -> Tensor:
        pieces = [slice(begin, begin + rows) for begin in range(0, len(hidden_MD), rows)]
        losses = []
        if learning:
            dhidden_MD = torch.empty_like(hidden_MD)
            wide = torch.promote_types(weight_VD.dtype, torch.float32) if len(pieces) > 1 else weight_VD.dtype
            dweight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device)
        for piece in pieces:
            logits = hidden_MD[piece] @ weight_VD.t()
            losses.append(_losses_(logits, labels_M[piece], mask_M[piece] if learning else None, group, backend))
            if learning:
                torch.mm(logits, weight_VD, out=dhidden_MD[piece])
                dweight_VD += logits.t() @ hidden_MD[piece]
            del logits  # before the next piece's are made
        if learning:
            ctx.gradients = dhidden_MD, dweight_VD.to(weight_VD.dtype)
        every = torch.cat(losses)
        return (every * mask_M.to(every.dtype)).sum()

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden_MD, dweight_VD), ctx.gradients = ctx.gradients, None
        return dhidden_MD.mul_(dtotal), dweight_VD.mul_(dtotal), None, None, None, None, None, None


def _losses_(logits_MV: Tensor, labels_M: Tensor, mask_M: Tensor | None, group: dist.ProcessGroup,
             backend: str) -> Tensor:
    """Losses [M]; with a mask the logits become the gradient of their masked sum."""
    if group.size() == 1:
        return cross_entropy_(logits=logits_MV, labels=labels_M, weight=mask_M, backend=backend)
    first = group.rank() * logits_MV.shape[1]
    largest, *sums = softmax_statistics(logits=logits_MV, labels=labels_M, first=first, backend=backend)
    common = largest.clone()
    dist.all_reduce(common, op=dist.ReduceOp.MAX, group=group)
    found = torch.stack([sums[0] * (largest - common).exp(), sums[1]])
    dist.all_reduce(found, group=group)
    if mask_M is not None:
        cross_entropy_gradient_(logits=logits_MV, labels=labels_M, log_sum=common + found[0].log(), weight=mask_M,
                                first=first, backend=backend)
    return found[0].log() - (found[1] - common)
