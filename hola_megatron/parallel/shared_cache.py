"""The exact cache over ranks: what is in it when a rank's first token reads it.

Every cache block belongs to the rank on which it closes; the tokens it has on the left neighbour (up to C - 1)
are fetched from there. A rank's shard is the w best tokens of the blocks that close on it, so

    cache at a block = the w best of (the shards of all earlier ranks, and this rank's own earlier blocks)

exactly: a top w is the top w of the top w's of its parts, scores never change once written, and no token of an
open block is in any shard. The result is an ordinary `HolaState`, the memory of one sequence that goes on, and
the one-rank read takes it from there. k and v of fetched tokens keep their gradients: they return to the rank
of the token, added up over the ranks that read it. The choice has none.

Shapes: N rows (1 for packed documents), T tokens of a row on this rank, C block, w slots, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hola_kernels import HolaState, KernelError
from hola_megatron.parallel.collectives import Pending, as_bytes, gather, reduce_scatter, shift
from hola_megatron.parallel.part import Part


@dataclass(frozen=True)
class Shard:
    """Candidates of one rank, in order of position; empty places (score -inf, position -1) last.

    k [N, H, w, K], v [N, H, w, V], score [N, H, w], position [N, H, w] int64 in the document.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    position: Tensor


def entering_memory(k_NTHK: Tensor, v_NTHV: Tensor, score_NTH: Tensor, state_NHKV: Tensor, part: Part,
                    group: dist.ProcessGroup, block: int, slots: int) -> HolaState:
    """The memory with which the first document of every row enters this rank (empty if it begins here).

    score: what the cache ranks by, with the true states. state: passed through. One exchange with the
    neighbours, then one all-gather: their sizes depend on C, w and the widths, never on T.
    Raises KernelError where a block could span more than two ranks.
    """
    check_part(part, block)
    opened = part.before % block
    open_k, open_v, open_score = _open_block(k_NTHK, v_NTHV, score_NTH, opened, group, block)
    shard = _local_shard(k_NTHK, v_NTHV, score_NTH, (open_k, open_v, open_score), part, opened, block, slots)
    shards = GatherShards.apply(shard.k, shard.v, shard.score, shard.position, group)
    earlier = range(part.first_rank, part.rank) if part.before else range(0)
    cache, _ = merge(*(x[earlier.start: earlier.stop] for x in shards), slots)
    length = torch.full((k_NTHK.shape[0],), part.before, dtype=torch.int64, device=k_NTHK.device)
    return HolaState(state_NHKV, cache.k, cache.v, cache.score, cache.position, open_k, open_v, open_score, length)


def check_part(part: Part, block: int) -> None:
    """KernelError where a block could span more than two ranks."""
    if part.tokens < block - 1:
        raise KernelError(f"{part.tokens} tokens a context-parallel rank: a cache block of {block} would span more "
                          f"than two ranks; take at least {block - 1} tokens a rank, or fewer ranks")


def _open_block(k: Tensor, v: Tensor, score: Tensor, opened: int, group: dist.ProcessGroup,
                block: int) -> tuple[Tensor, Tensor, Tensor]:
    """k [N, C, H, K], v, score [N, C, H] of the block that the left neighbour leaves open, zeros behind its tokens."""
    halo = block - 1
    if not halo:
        return tuple(x[:, :1] * 0 for x in (k, v, score))
    from_left = ShiftTokens.apply(*(x[:, x.shape[1] - halo:] for x in (k, v, score)), group)
    return tuple(F.pad(x[:, halo - opened:], (0, 0) * (x.ndim - 2) + (0, block - opened)) for x in from_left)


def _local_shard(k: Tensor, v: Tensor, score: Tensor, opened_tokens: tuple[Tensor, Tensor, Tensor], part: Part,
                 opened: int, block: int, slots: int) -> Shard:
    """The w best of the last document's blocks that close on this rank."""
    open_k, open_v, open_score = opened_tokens
    if not part.is_one_document:  # the last document begins here: nothing of it is on the left
        opened = 0
    first = part.before - opened if part.is_one_document else 0
    begins = part.tokens - part.tail
    scores = torch.cat([open_score[:, :opened], score[:, begins:].to(open_score.dtype)], 1)
    closed = scores.shape[1] // block * block if part.goes_on else 0
    scores = scores[:, :closed].transpose(1, 2)
    # a stable sort keeps the earlier of equals
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :slots].sort(-1).values

    def pick(tokens: Tensor, at_left: Tensor) -> Tensor:
        index = best.transpose(1, 2)[..., None]

        def rows(x: Tensor, at: Tensor) -> Tensor:
            return x.gather(1, at.clamp(0, x.shape[1] - 1).expand(-1, -1, -1, x.shape[-1]))

        found = torch.where(index < opened, rows(at_left, index), rows(tokens, index - opened + begins))
        return F.pad(found.transpose(1, 2), (0, 0, 0, slots - found.shape[1]))

    missing = (0, slots - best.shape[-1])
    return Shard(pick(k, open_k), pick(v, open_v), F.pad(scores.gather(-1, best), missing, value=-torch.inf),
                 F.pad(best + first, missing, value=-1))


def merge(k: Tensor, v: Tensor, score: Tensor, position: Tensor, slots: int) -> tuple[Shard, Tensor]:
    """The w best of J shards [J, N, H, w, ...] as one, and which of the J * w places they come from [N, H, <= w]."""
    k, v, score, position = (x.movedim(0, 2).flatten(2, 3) for x in (k, v, score, position))
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    where = position.gather(-1, best)
    best = best.gather(-1, where.masked_fill(where < 0, torch.iinfo(torch.int64).max).sort(dim=-1).indices)
    missing = (0, slots - best.shape[-1])

    def rows(x: Tensor) -> Tensor:
        return F.pad(x.gather(2, best[..., None].expand(*best.shape, x.shape[-1])), (0, 0, *missing))

    shard = Shard(rows(k), rows(v), F.pad(score.gather(-1, best), missing, value=-torch.inf),
                  F.pad(position.gather(-1, best), missing, value=-1))
    return shard, best


class GatherShards(torch.autograd.Function):
    """k, v, score, position of every rank's shard, [R, ...] each: one all-gather, and one reduce-scatter of dk, dv."""

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, score: Tensor, position: Tensor,
                group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.group, ctx.widths, ctx.dtypes = group, (k.shape[-1], v.shape[-1]), (k.dtype, v.dtype)
        everyone = unpack_shards(*send_shard(Shard(k, v, score, position), group))
        ctx.mark_non_differentiable(everyone.score, everyone.position)
        return everyone.k, everyone.v, everyone.score, everyone.position

    @staticmethod
    def backward(ctx, dk: Tensor, dv: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        wide = torch.promote_types(dk.dtype, torch.float32)
        both = reduce_scatter(torch.cat([dk.to(wide), dv.to(wide)], -1), ctx.group, "cache shard gradients")
        dk, dv = both.split(ctx.widths, -1)
        return dk.to(ctx.dtypes[0]), dv.to(ctx.dtypes[1]), None, None, None


class ShiftTokens(torch.autograd.Function):
    """k, v and score of the left neighbour's last tokens, in one message; dk and dv return in one."""

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, score: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        ctx.group = group
        parts = [k, v, score[..., None]]
        k, v, score = unpack(shift(pack(parts), 1, group, "open block"), parts)
        score = score[..., 0]
        ctx.mark_non_differentiable(score)
        return k, v, score

    @staticmethod
    def backward(ctx, dk: Tensor, dv: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        parts = [dk, dv]
        return *unpack(shift(pack(parts), -1, ctx.group, "open block gradients"), parts), None, None


def send_shard(shard: Shard, group: dist.ProcessGroup) -> tuple[Pending, list[Tensor]]:
    """Start the all-gather of this rank's candidates; `unpack_shards` takes both."""
    parts = [shard.k, shard.v, shard.score[..., None], shard.position[..., None].to(torch.int32)]
    return gather(pack(parts), group, "cache shards"), parts


def unpack_shards(pending: Pending, parts: list[Tensor]) -> Shard:
    """The candidates of every rank, [R, N, H, w, ...]."""
    k, v, score, position = unpack(pending.wait(), parts)
    return Shard(k, v, score[..., 0], position[..., 0].long())


def pack(parts: list[Tensor]) -> Tensor:
    """Tensors [..., width] of any dtypes as one of bytes [..., bytes], so that one message carries them."""
    return torch.cat([as_bytes(x.detach().contiguous()).view(*x.shape[:-1], -1) for x in parts], -1)


def unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Undo `pack`; `packed` may have more leading axes than `like`, whose widths and dtypes count."""
    widths = [x.shape[-1] * x.element_size() for x in like]
    return [x.contiguous().view(y.dtype) for x, y in zip(packed.split(widths, -1), like, strict=True)]
