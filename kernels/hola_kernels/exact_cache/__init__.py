"""The exact cache: which tokens it holds, and how they are read."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend, interpreted
from hola_kernels.checks import (
    check_floating,
    check_memory,
    check_read_parameters,
    check_tokens,
    segments_of,
)
from hola_kernels.errors import KernelError
from hola_kernels.exact_cache.read_configs import WINDOW_COLUMNS, read_refusal
from hola_kernels.exact_cache.reference import cache_attention_reference
from hola_kernels.exact_cache.torch_blocks import (
    cache_ages_blocks,
    cache_attention_blocks,
    read_mass_blocks,
    select_tokens,
)
from hola_kernels.operation import operation
from hola_kernels.options import CacheOptions
from hola_kernels.packed import PackedDocuments, documents_of
from hola_kernels.state import HolaState


def _cache_attention_triton(*arguments: object, **options: bool) -> tuple[Tensor, HolaState]:
    from hola_kernels.exact_cache.triton_read import cache_attention_triton  # on first use: triton may be missing

    return cache_attention_triton(*arguments, **options)


IMPLEMENTATIONS = {"reference": cache_attention_reference, "torch": cache_attention_blocks,
                   "triton": _cache_attention_triton}


@operation
def exact_read(*, q: Tensor, k: Tensor, v: Tensor, score: Tensor, gamma_q: Tensor, gamma_k: Tensor,
               sink: Tensor | None, block: int = CacheOptions.block, slots: int = CacheOptions.slots,
               read_norm: str = CacheOptions.read_norm, local: str = CacheOptions.local, window: int | None = None,
               cu_seqlens: Tensor | PackedDocuments | None = None, memory: HolaState | None = None,
               backend: str = "auto") -> tuple[Tensor, HolaState]:
    """Select the cache from the scores, block by block, and read cache, local part and sink.

    q, k [B, T, H, K], v [B, T, H, V] not normalised; score [B, T, H]; gamma_q, gamma_k [K];
    sink [H] or None; block, slots, read_norm, local and window as in `CacheOptions`. Returns o_cache [B, T, H, V] in
    v's dtype and the memory after the call (its compressed `state` is the one given). Raises KernelError.
    """
    options = CacheOptions(block, slots, read_norm=read_norm, local=local, window=window)
    _check_read(q, k, v, score, gamma_q, gamma_k, sink)
    device_cu_seqlens, fresh = segments_of(q, cu_seqlens), memory is None
    memory = check_memory(memory, device_cu_seqlens.numel() - 1, k, v, options)
    name = choose_backend(backend, q.device, read_refusal(k, v) or options_refusal(options))
    if name == "triton" and not v.numel():
        name = "torch"
    run = IMPLEMENTATIONS[name]
    if name == "triton":
        run = functools.partial(run, fresh=fresh, equal_length=cu_seqlens is None)
    o, after = run(*(x.flatten(0, 1) for x in (q, k, v, score)), gamma_q, gamma_k, sink, options, device_cu_seqlens,
                   memory)
    return o.view(v.shape).to(v.dtype), after


@operation
def exact_read_only(*, q: Tensor, k: Tensor, v: Tensor, score: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                    sink: Tensor | None, block: int = CacheOptions.block, slots: int = CacheOptions.slots,
                    read_norm: str = CacheOptions.read_norm, local: str = CacheOptions.local,
                    window: int | None = None, cu_seqlens: Tensor | PackedDocuments | None = None,
                    memory: HolaState | None = None,
                    open_tokens: int = 0, backend: str = "auto") -> Tensor:
    """o_cache [B, T, H, V] of exact_read where nobody wants the memory after it: nothing waits for the device.

    With a memory (and then without cu_seqlens) each of the B sequences has `open_tokens` tokens in its open block, as
    memory.open_count says. Differentiable also in the memory's k and v. Raises KernelError.
    """
    options = CacheOptions(block, slots, read_norm=read_norm, local=local, window=window)
    if memory is not None and cu_seqlens is not None:
        raise KernelError("exact_read_only: memory goes with sequences of one length, without cu_seqlens")
    _check_read(q, k, v, score, gamma_q, gamma_k, sink)
    documents = documents_of(q, cu_seqlens, read=False)
    refusal = read_refusal(k, v) or options_refusal(options)
    if choose_backend(backend, q.device, refusal) != "triton" or not v.numel():
        return exact_read(q=q, k=k, v=v, score=score, gamma_q=gamma_q, gamma_k=gamma_k, sink=sink,
                          **options.of_the_read, cu_seqlens=documents, memory=memory, backend=backend)[0]
    if memory is not None:
        memory = check_memory(memory, q.shape[0], k, v, options)
    return _read_only_triton(q, k, v, score, gamma_q, gamma_k, sink, options, documents, memory, open_tokens)


def _read_only_triton(q: Tensor, k: Tensor, v: Tensor, score: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                      sink: Tensor | None, options: CacheOptions, documents: PackedDocuments | None,
                      memory: HolaState | None, open_tokens: int) -> Tensor:
    from hola_kernels.exact_cache import triton_read  # on first use: triton may be missing

    if memory is not None:
        return triton_read.continue_read_triton(q, k, v, score, gamma_q, gamma_k, sink, options, memory, open_tokens)
    flat = {n: x.flatten(0, 1) for n, x in (("q", q), ("k", k), ("v", v), ("score", score))}
    blocks = triton_read.CacheBlocks.cut(segments_of(q, documents), flat["q"].shape[0], options,
                                         equal_length=documents is None)
    return triton_read.cache_attention_combine(
        **flat, gamma_q=gamma_q, gamma_k=gamma_k, sink=sink, gate=None, o_state=None, blocks=blocks).view(v.shape)


@operation
def select_cache(*, score: Tensor, block: int = CacheOptions.block, slots: int = CacheOptions.slots,
                 cu_seqlens: Tensor | PackedDocuments | None = None, backend: str = "auto") -> Tensor:
    """The tokens each block sees of its past: [U, H, slots] flat token numbers, -1 where a slot is empty.

    score [B, T, H]; blocks are numbered segment by segment. Ties stay with the earlier token.
    """
    options = CacheOptions(block, slots)
    _check_scores(score)
    device_cu_seqlens = segments_of(score, cu_seqlens)
    refusal = None if score.dtype == torch.float32 else f"selection takes float32 scores, not {score.dtype}"
    if choose_backend(backend, score.device, refusal) == "triton" and score.numel():
        return _select_triton(score, device_cu_seqlens, options, equal_length=cu_seqlens is None)
    nothing = torch.zeros(*score.shape, 1, device=score.device)
    memory = check_memory(None, device_cu_seqlens.numel() - 1, nothing, nothing, options)
    rows = select_tokens(score.detach().flatten(0, 1), device_cu_seqlens, memory).rows
    return torch.where(rows < score.shape[0] * score.shape[1], rows, -1)


def _select_triton(score: Tensor, cu_seqlens: Tensor, options: CacheOptions, *, equal_length: bool) -> Tensor:
    from hola_kernels.exact_cache.triton_read import CacheBlocks, select_slots

    flat = score.detach().flatten(0, 1).contiguous()
    blocks = CacheBlocks.cut(cu_seqlens, flat.shape[0], options, equal_length=equal_length)
    chosen = select_slots(score_MH=flat, plan=blocks.plan, slots=options.slots)
    return chosen[: int(blocks.table.first_block[-1])].long()


@operation
def read_mass(*, q: Tensor, k: Tensor, v: Tensor, score: Tensor, gamma_q: Tensor, gamma_k: Tensor,
              sink: Tensor | None, block: int = CacheOptions.block, slots: int = CacheOptions.slots,
              read_norm: str = CacheOptions.read_norm, local: str = CacheOptions.local, window: int | None = None,
              cu_seqlens: Tensor | PackedDocuments | None = None, memory: HolaState | None = None) -> Tensor:
    """[B, T, H, 3]: the share of every read's softmax on cached slots, local part, and sink; as in exact_read."""
    options = CacheOptions(block, slots, read_norm=read_norm, local=local, window=window)
    _check_read(q, k, v, score, gamma_q, gamma_k, sink)
    device_cu_seqlens = segments_of(q, cu_seqlens)
    memory = check_memory(memory, device_cu_seqlens.numel() - 1, k, v, options)
    mass = read_mass_blocks(*(x.flatten(0, 1) for x in (q, k, v, score)), gamma_q, gamma_k, sink, options,
                            device_cu_seqlens, memory)
    return mass.view(*score.shape, 3)


@operation
def cache_ages(*, score: Tensor, block: int = CacheOptions.block, slots: int = CacheOptions.slots,
               local: str = CacheOptions.local, window: int | None = None,
               cu_seqlens: Tensor | PackedDocuments | None = None, memory: HolaState | None = None) -> Tensor:
    """[A] int64: the age in tokens of every token that the caches of all blocks hold, when the block begins.

    score [B, T, H]; as in exact_read. Nothing where no block has a cached token. Raises KernelError.
    """
    options = CacheOptions(block, slots, local=local, window=window)
    _check_scores(score)
    device_cu_seqlens = segments_of(score, cu_seqlens)
    nothing = torch.zeros(*score.shape, 1, device=score.device)
    if memory is None:
        memory = check_memory(None, device_cu_seqlens.numel() - 1, nothing, nothing, options)
    return cache_ages_blocks(score.detach().flatten(0, 1), device_cu_seqlens, memory)


def options_refusal(options: CacheOptions) -> str | None:
    """Why the Triton kernels do not take these options, or None."""
    if options.reach is not None and options.block % WINDOW_COLUMNS and not interpreted():
        return (f"cache attention takes a window with blocks of a multiple of {WINDOW_COLUMNS} tokens, not "
                f"{options.block}")
    return None


def fused_refusal(options: CacheOptions) -> str | None:
    """Why the fused operation of one rank does not take these options, or None."""
    if (options.read_norm == "none" or options.merge != "add" or options.rope_theta is not None
            or options.state_delay):
        return "the fused operation takes read_norm 'rms' or 'l2', merge 'add', no rope_theta and no state_delay"
    return options_refusal(options)


def block_refusal(options: CacheOptions) -> str | None:
    """Why the decoding step and the fused operation over context ranks do not take these options, or None."""
    if options.local != "block" or not options.slots or fused_refusal(options):
        return ("local 'block', read_norm 'rms' or 'l2', merge 'add', no rope_theta, no state_delay and at least one "
                "slot")
    return None


def _check_read(q: Tensor, k: Tensor, v: Tensor, score: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                sink: Tensor | None) -> None:
    check_tokens(q, k, v, score=score)
    check_read_parameters(q, gamma_q, gamma_k, sink)


def _check_scores(score: Tensor) -> None:
    check_floating(score=score)
    if score.ndim != 3 or not score.shape[2]:
        raise KernelError(f"score {tuple(score.shape)} must be [B, T, H] with at least one head")


__all__ = ["cache_ages", "exact_read", "exact_read_only", "read_mass", "select_cache"]
