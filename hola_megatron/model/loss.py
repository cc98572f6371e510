"""Output projection and cross-entropy in chunks of tokens: the logits of all tokens never exist at once.

    each chunk:  logits = h W^T  ->  losses, and d logits in place  ->  dh = d logits W, dW += d logits^T h

Gradients are computed in the forward pass, while a chunk's logits exist, so that no product is computed twice. The mask
is the weight of each loss in the returned sum; backward multiplies by the gradient of that sum. Tensor ranks have
shards of W and exchange three numbers per token (softmax_statistics).

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
from hola_kernels.stages import first_order


def summed_loss(*, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, rows: int, group: dist.ProcessGroup,
                sequence_parallel: bool, backend: str = "auto") -> Tensor:
    """Sum of mask * cross-entropy over all tokens, float32 (float64 in a float64 model), equal on all tensor ranks.

    hidden: [S, B, D]; under sequence parallelism S is sharded over `group`.
    weight: [V, D], this rank's rows of the output projection.
    labels, mask: [B, S] int64, float32.
    rows: tokens per chunk.
    group: tensor ranks.
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
                group: dist.ProcessGroup, backend: str, needs_grad: bool) -> Tensor:
        chunks = [slice(start, start + rows) for start in range(0, len(hidden_MD), rows)]
        losses = []
        if needs_grad:
            dhidden_MD = torch.empty_like(hidden_MD)
            accumulate_dtype = weight_VD.dtype
            if len(chunks) > 1:
                accumulate_dtype = torch.promote_types(weight_VD.dtype, torch.float32)
            dweight_VD = torch.zeros(weight_VD.shape, dtype=accumulate_dtype, device=weight_VD.device)
        for chunk in chunks:
            logits = hidden_MD[chunk] @ weight_VD.t()
            losses.append(_losses_(logits, labels_M[chunk], mask_M[chunk] if needs_grad else None, group, backend))
            if needs_grad:
                torch.mm(logits, weight_VD, out=dhidden_MD[chunk])
                dweight_VD += logits.t() @ hidden_MD[chunk]
            del logits  # freed before the next chunk's are allocated
        if needs_grad:
            ctx.gradients = dhidden_MD, dweight_VD.to(weight_VD.dtype)
        every = torch.cat(losses)
        # where, not a product with zero: the loss of a masked token may be NaN
        return torch.where(mask_M != 0, every * mask_M.to(every.dtype), 0.0).sum()

    @staticmethod
    @first_order
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
