"""The bounded exact memory: which tokens are kept, and how they are read."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_cu_seqlens, check_memory, check_tokens, segments_of
from hola_kernels.errors import KernelError
from hola_kernels.exact_cache.read_configs import read_refusal
from hola_kernels.exact_cache.reference import exact_read_reference
from hola_kernels.exact_cache.torch_blocks import (
    cache_ages_blocks,
    exact_read_blocks,
    read_mass_blocks,
    select_tokens,
)
from hola_kernels.state import HolaState


def _exact_read_triton(*arguments: object, **options: bool) -> tuple[Tensor, HolaState]:
    from hola_kernels.exact_cache.triton_read import exact_read_triton  # on first use: triton may be missing

    return exact_read_triton(*arguments, **options)


IMPLEMENTATIONS = {"reference": exact_read_reference, "torch": exact_read_blocks, "triton": _exact_read_triton}


def exact_read(*, q: Tensor, k: Tensor, v: Tensor, score: Tensor, gamma_q: Tensor, gamma_k: Tensor,
               sink: Tensor | None, block: int = 256, slots: int = 64, read_norm: str = "rms",
               cu_seqlens: Tensor | None = None, memory: HolaState | None = None,
               backend: str = "auto") -> tuple[Tensor, HolaState]:
    """Select the cache from the scores, block by block, and read cache, own block and sink.

    q, k [B, T, H, K], v [B, T, H, V] not normalised; score [B, T, H]; gamma_q, gamma_k [K];
    sink [H] or None. Returns o_cache [B, T, H, V] in v's dtype and the memory after the call
    (its compressed `state` is the one given). Raises KernelError.
    """
    check_tokens(q, k, v, score, score, cu_seqlens)
    cuts, fresh = segments_of(q, cu_seqlens), memory is None
    memory = check_memory(memory, cuts.numel() - 1, k, v, block, slots)
    name = choose_backend(backend, q.device, read_refusal(k, v))
    run = IMPLEMENTATIONS[name]
    if name == "triton":
        run = functools.partial(run, fresh=fresh, dense=cu_seqlens is None)
    o, after = run(*(x.flatten(0, 1) for x in (q, k, v, score)), gamma_q, gamma_k, sink, read_norm, cuts, memory)
    return o.view(v.shape).to(v.dtype), after


def exact_read_only(*, q: Tensor, k: Tensor, v: Tensor, score: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                    sink: Tensor | None, block: int = 256, slots: int = 64, read_norm: str = "rms",
                    cu_seqlens: Tensor | None = None, memory: HolaState | None = None, opened: int = 0,
                    backend: str = "auto") -> Tensor:
    """o_cache [B, T, H, V] of exact_read where nobody wants the memory after it: nothing waits for the device.

    With a memory (and then without cu_seqlens) each of the B sequences has `opened` tokens in its open block, which
    is what memory.open_count holds. Differentiable also in the memory's k and v. Raises KernelError.
    """
    if memory is not None and cu_seqlens is not None:
        raise KernelError("exact_read_only: memory goes with sequences of one length, without cu_seqlens")
    arguments = {"gamma_q": gamma_q, "gamma_k": gamma_k, "sink": sink, "read_norm": read_norm}
    if choose_backend(backend, q.device, read_refusal(k, v)) != "triton":
        return exact_read(q=q, k=k, v=v, score=score, **arguments, block=block, slots=slots, cu_seqlens=cu_seqlens,
                          memory=memory, backend=backend)[0]
    from hola_kernels.exact_cache import triton_read  # on first use: triton may be missing

    check_tokens(q, k, v, score, score, cu_seqlens)
    if memory is not None:
        memory = check_memory(memory, q.shape[0], k, v, block, slots)
        return triton_read.continue_read_triton(q, k, v, score, gamma_q, gamma_k, sink, read_norm, memory, opened)
    flat = {n: x.flatten(0, 1) for n, x in (("q", q), ("k", k), ("v", v), ("score", score))}
    blocks = triton_read.Blocks.cut(segments_of(q, cu_seqlens), flat["q"].shape[0], block=block, slots=slots,
                                    dense=cu_seqlens is None)
    return triton_read.exact_read_combine(**flat, **arguments, gate=None, o_state=None, blocks=blocks).view(v.shape)


def select_cache(*, score: Tensor, block: int = 256, slots: int = 64, cu_seqlens: Tensor | None = None,
                 backend: str = "auto") -> Tensor:
    """The tokens each block sees of its past: [U, H, slots] flat token numbers, -1 where a slot is empty.

    score [B, T, H]; blocks are numbered segment by segment. Ties stay with the earlier token.
    """
    check_cu_seqlens(score, cu_seqlens)
    cuts = segments_of(score, cu_seqlens)
    refusal = None if score.dtype == torch.float32 else f"selection takes float32 scores, not {score.dtype}"
    if choose_backend(backend, score.device, refusal) == "triton":
        return _select_triton(score, cuts, block, slots, dense=cu_seqlens is None)
    nothing = torch.zeros(*score.shape, 1, device=score.device)
    memory = HolaState.empty(cuts.numel() - 1, score.shape[2], 1, 1, block=block, slots=slots, device=score.device)
    rows = select_tokens(score.detach().flatten(0, 1), cuts, check_memory(
        memory, cuts.numel() - 1, nothing, nothing, block, slots)).rows
    return torch.where(rows < score.shape[0] * score.shape[1], rows, -1)


def _select_triton(score: Tensor, cuts: Tensor, block: int, slots: int, *, dense: bool) -> Tensor:
    from hola_kernels.exact_cache.triton_read import Blocks, select_slots

    flat = score.detach().flatten(0, 1).contiguous()
    blocks = Blocks.cut(cuts, flat.shape[0], block=block, slots=slots, dense=dense)
    return select_slots(score_MH=flat, plan=blocks.plan, slots=slots)[: int(blocks.units.first[-1])].long()


def read_mass(*, q: Tensor, k: Tensor, v: Tensor, score: Tensor, gamma_q: Tensor, gamma_k: Tensor,
              sink: Tensor | None, block: int = 256, slots: int = 64, read_norm: str = "rms",
              cu_seqlens: Tensor | None = None, memory: HolaState | None = None) -> Tensor:
    """[B, T, H, 3]: the share of every read's softmax on cached slots, own block, and sink; as in exact_read."""
    check_tokens(q, k, v, score, score, cu_seqlens)
    cuts = segments_of(q, cu_seqlens)
    memory = check_memory(memory, cuts.numel() - 1, k, v, block, slots)
    mass = read_mass_blocks(*(x.flatten(0, 1) for x in (q, k, v, score)), gamma_q, gamma_k, sink, read_norm,
                            cuts, memory)
    return mass.view(*score.shape, 3)


def cache_ages(*, score: Tensor, block: int = 256, slots: int = 64, cu_seqlens: Tensor | None = None,
               memory: HolaState | None = None) -> Tensor:
    """[A] int64: the age in tokens of every token that the caches of all blocks hold, when the block begins.

    score [B, T, H]; as in exact_read. Nothing where no block has a cached token. Raises KernelError.
    """
    check_cu_seqlens(score, cu_seqlens)
    cuts = segments_of(score, cu_seqlens)
    nothing = torch.zeros(*score.shape, 1, device=score.device)
    if memory is None:
        memory = check_memory(None, cuts.numel() - 1, nothing, nothing, block, slots)
    return cache_ages_blocks(score.detach().flatten(0, 1), cuts, memory)


__all__ = ["cache_ages", "exact_read", "exact_read_only", "read_mass", "select_cache"]
