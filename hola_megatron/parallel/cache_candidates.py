"""Selection of the exact cache over context-parallel ranks.

A cache block belongs to the rank that holds its last token. Its tokens on the left neighbour (at most C - 1) are
received from there, and with them the P full blocks before it that a sliding window reaches into: those are merged into
the cache on the rank that receives them. A rank's candidates are the w tokens of highest score in its blocks, so

    cache at a block = top w of (candidates of all earlier ranks, earlier blocks of this rank)

This is exact: the top w of a union is the top w of the subsets' top w, scores never change once computed, and tokens
of an incomplete block are no candidates. The result is a `HolaState`, from which the one-rank operation continues.
Gradients of received k and v are sent back to the rank of the token and summed over the ranks that read it. The
selection itself has no gradient.

Shapes: N rows (1 for packed documents), T tokens of a row on this rank, C block, w slots, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hola_kernels import HolaState, KernelError
from hola_kernels.stages import CacheOptions, first_order
from hola_megatron.parallel.collectives import Pending, as_bytes, gather, reduce_scatter, shift
from hola_megatron.parallel.sequence_shard import SequenceShard


@dataclass(frozen=True)
class CacheCandidates:
    """Candidates of one rank, in order of position; empty slots (score -inf, position -1) last.

    k [N, H, w, K], v [N, H, w, V], score [N, H, w], position [N, H, w] int64 in the document.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    position: Tensor


def entering_memory(k_NTHK: Tensor, v_NTHV: Tensor, score_NTH: Tensor, state_NHKV: Tensor, shard: SequenceShard,
                    group: dist.ProcessGroup, options: CacheOptions) -> HolaState:
    """The decoding state before this rank's first token, for the first document of every row.

    The cache is empty where the document starts on this rank. Messages: one exchange with the neighbours, then one
    all-gather; their sizes depend on C, w and the widths, not on T.

    k_NTHK, v_NTHV: this rank's keys and values.
    score_NTH: the cache score of every token, computed with the true states.
    state_NHKV: the matrix state before the first token, float32; returned unchanged in the result.
    Raises KernelError where a block, or what a sliding window reaches, could span more than two ranks.
    """
    check_shard(shard, options)
    open_blocks = _receive_open_blocks(k_NTHK, v_NTHV, score_NTH, open_tokens(shard, options), group, options)
    local = _local_candidates(k_NTHK, v_NTHV, score_NTH, open_blocks, shard, options)
    length = torch.full((k_NTHK.shape[0],), shard.before, dtype=torch.int64, device=k_NTHK.device)
    if not options.slots:  # there are no candidates to exchange
        return HolaState(state_NHKV, local.k, local.v, local.score, local.position, *open_blocks, length,
                         options.window_blocks)
    gathered = GatherCandidates.apply(local.k, local.v, local.score, local.position, group)
    earlier = range(shard.first_rank, shard.rank) if shard.before else range(0)
    cache, _ = merge(*(x[earlier.start: earlier.stop] for x in gathered), options.slots)
    return HolaState(state_NHKV, cache.k, cache.v, cache.score, cache.position, *open_blocks, length,
                     options.window_blocks)


def least_tokens(options: CacheOptions) -> int:
    """Tokens that a rank needs, so that the open blocks of its first token lie on two ranks at most."""
    return (1 + options.window_blocks) * options.block - 1


def open_tokens(shard: SequenceShard, options: CacheOptions) -> int:
    """Tokens of the first document on the left neighbour that are not merged into the cache yet."""
    merged = max(shard.before // options.block - options.window_blocks, 0) * options.block
    return shard.before - merged


def check_shard(shard: SequenceShard, options: CacheOptions) -> None:
    """KernelError where a block, or what a sliding window reaches, could span more than two ranks, or a state is late.
    """
    if options.state_delay:
        raise KernelError(f"state_delay = {options.state_delay} is not possible over context ranks; set it to 0")
    least = least_tokens(options)
    if shard.tokens < least:
        what = f"a cache block of {options.block}"
        if options.window_blocks:
            what += f" and a window of {options.reach}"
        raise KernelError(f"{shard.tokens} tokens a context-parallel rank: {what} would span more "
                          f"than two ranks; take at least {least} tokens a rank, or fewer ranks")


def _receive_open_blocks(k: Tensor, v: Tensor, score: Tensor, carried: int, group: dist.ProcessGroup,
                         options: CacheOptions) -> tuple[Tensor, Tensor, Tensor]:
    """k [N, (1 + P) C, H, K], v, score [N, (1 + P) C, H]: the left neighbour's open tokens, padded with zeros."""
    halo = least_tokens(options)
    if not halo:
        return tuple(x[:, :1] * 0 for x in (k, v, score))
    from_left = ShiftTokens.apply(*(x[:, x.shape[1] - halo:] for x in (k, v, score)), group)
    missing = (0, halo + 1 - carried)
    return tuple(F.pad(x[:, halo - carried:], (0, 0) * (x.ndim - 2) + missing) for x in from_left)


def _local_candidates(k: Tensor, v: Tensor, score: Tensor, open_blocks: tuple[Tensor, Tensor, Tensor],
                      shard: SequenceShard, options: CacheOptions) -> CacheCandidates:
    """The w tokens of highest score in the last document's blocks that are merged into the cache on this rank."""
    (open_k, open_v, open_score), slots = open_blocks, options.slots
    # zero where the last document starts on this rank: no tokens on the left neighbour
    carried = open_tokens(shard, options) if shard.is_one_document else 0
    first = shard.before - carried if shard.is_one_document else 0
    start = shard.tokens - shard.tail
    scores = torch.cat([open_score[:, :carried], score[:, start:].to(open_score.dtype)], 1)
    merged = max(scores.shape[1] // options.block - options.window_blocks, 0) * options.block
    scores = scores[:, :merged if shard.continues else 0].transpose(1, 2)
    # stable: of equal scores, the earlier token is selected
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :slots].sort(-1).values

    def select(local: Tensor, received: Tensor) -> Tensor:
        index = best.transpose(1, 2)[..., None]

        def rows(x: Tensor, at: Tensor) -> Tensor:
            return x.gather(1, at.clamp(0, x.shape[1] - 1).expand(-1, -1, -1, x.shape[-1]))

        found = torch.where(index < carried, rows(received, index), rows(local, index - carried + start))
        return F.pad(found.transpose(1, 2), (0, 0, 0, slots - found.shape[1]))

    missing = (0, slots - best.shape[-1])
    return CacheCandidates(select(k, open_k), select(v, open_v),
                           F.pad(scores.gather(-1, best), missing, value=-torch.inf),
                           F.pad(best + first, missing, value=-1))


def merge(k: Tensor, v: Tensor, score: Tensor, position: Tensor, slots: int) -> tuple[CacheCandidates, Tensor]:
    """The top w of J ranks' candidates [J, N, H, w, ...], and their indices among all J * w [N, H, <= w]."""
    k, v, score, position = (x.movedim(0, 2).flatten(2, 3) for x in (k, v, score, position))
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    where = position.gather(-1, best)
    best = best.gather(-1, where.masked_fill(where < 0, torch.iinfo(torch.int64).max).sort(dim=-1).indices)
    missing = (0, slots - best.shape[-1])

    def rows(x: Tensor) -> Tensor:
        return F.pad(x.gather(2, best[..., None].expand(*best.shape, x.shape[-1])), (0, 0, *missing))

    best_of_all = CacheCandidates(
        rows(k), rows(v), F.pad(score.gather(-1, best), missing, value=-torch.inf),
        F.pad(position.gather(-1, best), missing, value=-1))
    return best_of_all, best


class GatherCandidates(torch.autograd.Function):
    """All-gather of k, v, score and position of the ranks' candidates [R, ...]; backward is a reduce-scatter of dk, dv.
    """

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, score: Tensor, position: Tensor,
                group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.group, ctx.widths, ctx.dtypes = group, (k.shape[-1], v.shape[-1]), (k.dtype, v.dtype)
        gathered = unpack_candidates(*send_candidates(CacheCandidates(k, v, score, position), group))
        ctx.mark_non_differentiable(gathered.score, gathered.position)
        return gathered.k, gathered.v, gathered.score, gathered.position

    @staticmethod
    @first_order
    def backward(ctx, dk: Tensor, dv: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        accumulate_dtype = torch.promote_types(dk.dtype, torch.float32)
        together = torch.cat([dk.to(accumulate_dtype), dv.to(accumulate_dtype)], -1)
        both = reduce_scatter(together, ctx.group, "cache shard gradients")
        dk, dv = both.split(ctx.widths, -1)
        return dk.to(ctx.dtypes[0]), dv.to(ctx.dtypes[1]), None, None, None


class ShiftTokens(torch.autograd.Function):
    """k, v and score of the left neighbour's last tokens, in one message; backward returns dk and dv in one message."""

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, score: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        ctx.group = group
        tensors = [k, v, score[..., None]]
        k, v, score = unpack(shift(pack(tensors), 1, group, "open block"), tensors)
        score = score[..., 0]
        ctx.mark_non_differentiable(score)
        return k, v, score

    @staticmethod
    @first_order
    def backward(ctx, dk: Tensor, dv: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [dk, dv]
        return *unpack(shift(pack(tensors), -1, ctx.group, "open block gradients"), tensors), None, None


def send_candidates(own: CacheCandidates, group: dist.ProcessGroup) -> tuple[Pending, list[Tensor]]:
    """Start the all-gather of this rank's candidates. Returns the arguments of `unpack_candidates`."""
    tensors = [own.k, own.v, own.score[..., None], own.position[..., None].to(torch.int32)]
    return gather(pack(tensors), group, "cache shards"), tensors


def unpack_candidates(pending: Pending, tensors: list[Tensor]) -> CacheCandidates:
    """The candidates of every rank, [R, N, H, w, ...]."""
    k, v, score, position = unpack(pending.wait(), tensors)
    return CacheCandidates(k, v, score[..., 0], position[..., 0].long())


def pack(tensors: list[Tensor]) -> Tensor:
    """Tensors [..., width] of any dtypes as one uint8 tensor [..., bytes], so that they travel in one message."""
    return torch.cat([as_bytes(x.detach().contiguous()).view(*x.shape[:-1], -1) for x in tensors], -1)


def unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Inverse of `pack`. like: gives widths and dtypes; `packed` may have more leading axes."""
    widths = [x.shape[-1] * x.element_size() for x in like]
    return [x.contiguous().view(y.dtype) for x, y in zip(packed.split(widths, -1), like, strict=True)]
