"""Softmax attention to the tokens that are kept exactly, a set that grows with the sequence (HAM, arXiv 2603.22325)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_floating, check_tokens, check_vectors, check_writable, segments_of
from hola_kernels.errors import KernelError
from hola_kernels.kept_attention.kept_tokens import KeptTokens
from hola_kernels.kept_attention.reference import kept_attention_reference
from hola_kernels.kept_attention.tiles import kept_refusal
from hola_kernels.kept_attention.torch_chunks import kept_attention_chunks
from hola_kernels.norms import compute_dtype
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments


def _kept_attention_triton(*arguments: object, **options: bool) -> Tensor:
    from hola_kernels.kept_attention.triton_read import kept_attention_triton  # on first use: triton may be missing

    return kept_attention_triton(*arguments, **options)


IMPLEMENTATIONS = {"reference": kept_attention_reference, "torch": kept_attention_chunks,
                   "triton": _kept_attention_triton}


@operation
def kept_attention(*, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sink: Tensor | None = None,
                   log_weight: Tensor | None = None, scale: float | None = None,
                   cu_seqlens: Tensor | PackedDocuments | None = None, state: KeptTokens | None = None,
                   backend: str = "auto") -> Tensor:
    """Every token reads the kept tokens before it in its document, itself, and the sink.

    q, k [B, T, H, K], v [B, T, H, V] as they are read (norms and rotary positions applied); keep [B, T, H] bool;
    sink [H], a logit with value zero; log_weight [B, T, H], added to the logits of kept tokens where later tokens read
    them (not where a token reads itself); scale of the logits, K^-1/2 by default. Differentiable in q, k, v, sink and
    log_weight; keep has no gradient.

    state: B sequences go on from it, without cu_seqlens and without gradients; what they keep is appended in place.
    Returns o [B, T, H, V] in v's dtype. Raises KernelError.
    """
    check_tokens(q, k, v, **({} if log_weight is None else {"log_weight": log_weight}))
    scale = _check_read(q, k, v, keep, sink, scale)
    if state is not None:
        if cu_seqlens is not None:
            raise KernelError("kept_attention: state goes with sequences of one length, without cu_seqlens")
        _check_state(state, q, k, v, sink, log_weight)
    device_cu_seqlens = segments_of(q, cu_seqlens)
    name = choose_backend(backend, q.device, kept_refusal(q, k, v))
    if name == "triton" and not v.numel():
        name = "torch"
    run = IMPLEMENTATIONS[name]
    if name == "triton":
        run = functools.partial(run, equal_length=cu_seqlens is None)
    weight = None if log_weight is None else log_weight.flatten(0, 1)
    o = run(*(x.flatten(0, 1) for x in (q, k, v, keep)), sink, weight, scale, device_cu_seqlens, state)
    if state is not None:
        state.append(k, v, keep, log_weight)
    return o.view(v.shape).to(v.dtype)


@operation
@torch.no_grad()
def kept_attention_step(*, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sink: Tensor | None = None,
                        log_weight: Tensor | None = None, scale: float | None = None, state: KeptTokens,
                        backend: str = "auto") -> Tensor:
    """One decoded token for each of N sequences; `state` is updated in place.

    q, k [N, H, K], v [N, H, V], keep and log_weight [N, H]; the rest as in kept_attention. Waits for the device only
    where the state's room must grow. Returns o [N, H, V] in v's dtype. Raises KernelError.
    """
    if q.ndim != 3:
        raise KernelError(f"q {tuple(q.shape)} must be [N, H, K]")
    one = {n: x if x is None else x.unsqueeze(1) for n, x in (("q", q), ("k", k), ("v", v), ("keep", keep),
                                                              ("log_weight", log_weight))}
    check_tokens(one["q"], one["k"], one["v"], **({} if log_weight is None else {"log_weight": one["log_weight"]}))
    scale = _check_read(one["q"], one["k"], one["v"], one["keep"], sink, scale)
    _check_state(state, one["q"], one["k"], one["v"], sink, log_weight)
    name = choose_backend(backend, q.device, "one token of kept_attention is read by torch")
    if name == "reference":
        return kept_attention(**one, sink=sink, scale=scale, state=state, backend="reference").squeeze(1)
    o = _read_step(q, k, v, sink, scale, state)
    state.append(one["k"], one["v"], one["keep"], one["log_weight"])
    return o.to(v.dtype)


def _read_step(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, scale: float, state: KeptTokens) -> Tensor:
    compute = compute_dtype(v)
    q, k, v = (x.to(compute) for x in (q, k, v))
    logits = torch.einsum("nhk,nchk->nhc", q, state.k.to(compute)) * scale
    logits = logits + state.log_weight.to(compute).transpose(1, 2)
    filled = torch.arange(state.capacity, device=q.device) < state.count[..., None]
    logits = [logits.masked_fill(~filled, -torch.inf), (q * k).sum(-1, keepdim=True) * scale]
    if sink is not None:
        logits.append(sink.to(compute)[None, :, None].expand_as(logits[1]))
    weights = torch.cat(logits, -1).softmax(-1)
    listed = torch.einsum("nhc,nchv->nhv", weights[..., : state.capacity], state.v.to(compute))
    return listed + weights[..., state.capacity, None] * v


def _check_read(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sink: Tensor | None, scale: float | None) -> float:
    """The scale of the logits."""
    if keep.dtype != torch.bool or keep.shape != q.shape[:3]:
        raise KernelError(f"keep {keep.dtype} {tuple(keep.shape)} must be torch.bool [B, T, H] = {tuple(q.shape[:3])}")
    check_vectors(sink=(sink, q.shape[2]))
    if scale is None:
        return q.shape[3] ** -0.5
    if not isinstance(scale, float | int) or isinstance(scale, bool) or not math.isfinite(scale):
        raise KernelError(f"scale = {scale!r} must be a finite number")
    return float(scale)


def _check_state(state: KeptTokens, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None,
                 log_weight: Tensor | None) -> None:
    if not isinstance(state, KeptTokens):
        raise KernelError(f"state must be a KeptTokens, not {type(state).__name__}")
    wanting = [n for n, x in (("q", q), ("k", k), ("v", v), ("sink", sink), ("log_weight", log_weight))
               if x is not None and x.requires_grad]
    if torch.is_grad_enabled() and wanting:
        raise KernelError(f"{wanting[0]} needs a gradient and state is updated in place; call under torch.no_grad()")
    sequences, heads, capacity = q.shape[0], q.shape[2], state.k.shape[1:2]
    shapes = {"k": (sequences, *capacity, *k.shape[2:]), "v": (sequences, *capacity, *v.shape[2:]),
              "log_weight": (sequences, *capacity, heads), "position": (sequences, *capacity, heads),
              "count": (sequences, heads), "length": (sequences,)}
    for name, x in state.tensors().items():
        whole = name in ("position", "count", "length")
        if x.shape != shapes[name] or x.device != k.device or (x.dtype == torch.int64) != whole:
            raise KernelError(f"state.{name} {x.dtype} {tuple(x.shape)} on {x.device} must be "
                              f"{'int64' if whole else 'floating-point'} {shapes[name]} on {k.device}")
    check_floating(**{f"state.{n}": getattr(state, n) for n in ("k", "v", "log_weight")})
    check_writable(**{f"state.{n}": x for n, x in state.tensors().items()})


__all__ = ["KeptTokens", "kept_attention", "kept_attention_step"]
