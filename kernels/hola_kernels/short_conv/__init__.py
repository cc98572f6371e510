"""Short convolution: each channel mixed with its own last W - 1 tokens, then SiLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_floating, check_writable, segments_of
from hola_kernels.errors import KernelError
from hola_kernels.norms import compute_dtype
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments
from hola_kernels.short_conv.reference import short_conv_reference
from hola_kernels.short_conv.torch_shifts import short_conv_shifts

Sections = tuple[Tensor, ...]


def _short_conv_triton(x_MD: Tensor, *arguments: Tensor, wanted: tuple[int, ...],
                       **options: Any) -> tuple[Sections, Tensor | None]:
    from hola_kernels.short_conv.triton_strips import in_one_launch, short_conv_triton  # on first use: may be missing

    if in_one_launch(wanted):
        return short_conv_triton(x_MD, *arguments, widths=wanted, **options)
    (y_MD,), after = short_conv_triton(x_MD, *arguments, widths=x_MD.shape[1:], **options)
    return y_MD.split(wanted, 1), after


IMPLEMENTATIONS = {"reference": short_conv_reference, "torch": short_conv_shifts, "triton": _short_conv_triton}


@operation
def short_conv(*, x: Tensor, weight: Tensor, cu_seqlens: Tensor | PackedDocuments | None = None,
               tail: Tensor | None = None, return_tail: bool = False, widths: tuple[int, ...] | None = None,
               dx_buffer: Callable[[], Tensor] | None = None,
               backend: str = "auto") -> Tensor | Sections | tuple[Tensor | Sections, Tensor]:
    """SiLU of the depthwise causal convolution of x over time.

    x [B, T, D]; weight [D, W], whose last column multiplies the current token. With cu_seqlens
    [N + 1], B is 1 and the tokens are N documents that do not see each other. tail [N, W - 1, D]
    (N = B without cu_seqlens): the last inputs before this call, oldest first, zeros when None.

    widths: channels of the sections in which y is wanted, each a contiguous tensor; they add up to D.
    dx_buffer: called in the backward pass, gives memory like x where the Triton backend may leave x's gradient.

    Returns y like x (with widths a tuple of [B, T, width]), and with return_tail the tail after the last token. All
    are differentiable in x, weight and tail. Raises KernelError.
    """
    device_cu_seqlens = _check(x, weight, cu_seqlens, tail)
    wanted = (x.shape[2],) if widths is None else tuple(widths)
    if not wanted or not all(isinstance(n, int) and n > 0 for n in wanted) or sum(wanted) != x.shape[2]:
        raise KernelError(f"widths {wanted} must be positive and add up to the D of x {tuple(x.shape)}")
    if tail is None:
        tail = x.new_zeros(device_cu_seqlens.numel() - 1, weight.shape[1] - 1, x.shape[2])
    name = choose_backend(backend, x.device, _refusal(x, weight))
    if name == "triton" and not x.numel():
        name = "torch"
    run, flat = IMPLEMENTATIONS[name], x.flatten(0, 1)
    if name == "triton":
        sections, after = run(flat, weight, device_cu_seqlens, tail, wanted=wanted,
                              equal_length=cu_seqlens is None, return_tail=return_tail, dx_buffer=dx_buffer)
    else:
        y_MD, after = run(flat, weight, device_cu_seqlens, tail)
        sections = y_MD.split(wanted, 1)
    sections = tuple(y.contiguous().unflatten(0, x.shape[:2]) for y in sections)
    y = sections[0] if widths is None else sections
    return (y, after) if return_tail else y


@operation
@torch.no_grad()
def short_conv_step(*, x: Tensor, weight: Tensor, tail: Tensor, backend: str = "auto") -> Tensor:
    """One decoded token for each of N sequences: x [N, D] -> y [N, D]; `tail` [N, W - 1, D] is updated in place.

    backend: as in hola_attention_step. Raises KernelError.
    """
    check_floating(x=x, weight=weight, tail=tail)
    if (x.ndim != 2 or weight.ndim != 2 or weight.shape[1] < 1 or weight.shape[0] != x.shape[1]
            or tail.shape != (x.shape[0], weight.shape[1] - 1, x.shape[1])):
        raise KernelError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and tail {tuple(tail.shape)} "
                          "must be [N, D], [D, W] and [N, W - 1, D]")
    check_writable(tail=tail)
    refusal = _refusal(x, weight) or (None if tail.is_contiguous() else "a tail that is not contiguous")
    name = choose_backend(backend, x.device, refusal)
    if name == "triton" and not x.numel():
        name = "torch"
    return (_step_triton if name == "triton" else _step_torch)(x, weight, tail)


def _step_triton(x_ND: Tensor, weight_DW: Tensor, tail_NJD: Tensor) -> Tensor:
    from hola_kernels.short_conv.triton_step import short_conv_step_triton  # on first use: triton may be missing

    return short_conv_step_triton(x_ND, weight_DW, tail_NJD)


def _step_torch(x_ND: Tensor, weight_DW: Tensor, tail_NJD: Tensor) -> Tensor:
    compute = compute_dtype(x_ND)
    window = torch.cat([tail_NJD.to(x_ND.dtype), x_ND[:, None]], 1)
    y = F.silu((window.to(compute) * weight_DW.to(compute).mT).sum(1))
    tail_NJD.copy_(window[:, 1:])
    return y.to(x_ND.dtype)


def _refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why the Triton kernels do not take these arguments, or None."""
    if weight.shape[1] > 4:
        return f"short convolution takes at most 4 taps, not {weight.shape[1]}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"short convolution takes float32, float16 and bfloat16, not {x.dtype}"
    return None


def _check(x: Tensor, weight: Tensor, cu_seqlens: Tensor | PackedDocuments | None, tail: Tensor | None) -> Tensor:
    """The cu_seqlens of the flat tokens, once the arguments fit each other."""
    check_floating(x=x, weight=weight, tail=tail)
    if x.ndim != 3 or not x.shape[2]:
        raise KernelError(f"x {tuple(x.shape)} must be [B, T, D] with at least one channel")
    if weight.ndim != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise KernelError(f"weight {tuple(weight.shape)} must be [D, W] with the D of x {tuple(x.shape)} and W >= 1")
    device_cu_seqlens = segments_of(x, cu_seqlens)
    want = (device_cu_seqlens.numel() - 1, weight.shape[1] - 1, x.shape[2])
    if tail is not None and tail.shape != want:
        raise KernelError(f"tail {tuple(tail.shape)} must be [N, W - 1, D] = {want}")
    return device_cu_seqlens


__all__ = ["short_conv", "short_conv_step"]
