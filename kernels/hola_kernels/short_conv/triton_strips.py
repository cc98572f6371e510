"""The short convolution in one pass over memory each way: a program loops down a strip of tokens.

A strip is `size` consecutive tokens of one document and CHANNELS channels, taken four tokens at
a time so that eight loads are under way at once; the last three inputs, and backward what
is known of the last three input gradients, stay in registers. So x, y, dy and dx cross HBM
once. A strip begins with the three inputs before it, from the document or its tail;
backward it also looks three tokens ahead, because those read its own.

    z_t = sum_j w_{W-1-j} x_{t-j}      y = SiLU(z)      dz = dy SiLU'(z)      dx_t = sum_j w_{W-1-j} dz_{t+j}

The weight gradient is summed per strip into HBM and then over strips: deterministic.
Kernels have four taps; a narrower convolution is one whose first taps are zero. Channels may come out in up to three
sections (q, k and v), each a tensor of its own, and their gradients in three: one launch all the same.
For 32,768 tokens of 3,072 channels in bf16: forward 0.40 GB, 0.094 ms at 4.3 TB/s; backward 0.60 GB, 0.14 ms.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.block_table import block_table
from hola_kernels.integers import cdiv
from hola_kernels.operation import first_order
from hola_kernels.triton_block_table import COUNT, FOLLOWING, INDEX, SEGMENT, START, block_entry
from hola_kernels.triton_rows import GradBuffer, contiguous_columns, gradient_rows
from hola_kernels.triton_sums import sum_parts

FORWARD_STRIP, BACKWARD_STRIP = 64, 128
LONG_BACKWARD_STRIP, ENOUGH_PROGRAMS = 256, 4096  # 7 % faster where that many programs are left: 32 a multiprocessor
CHANNELS, LEAST_CHANNELS = 128, 32  # of a program, one warp
SECTIONS = 3


@triton.jit
def _before(x_ptr, tail_ptr, row, back, index, segment, d, is_channel, D, x_stride, BEFORE: tl.constexpr):
    """Input number `back` (1 to 3) before a strip's first token `row`: from the document or from its tail."""
    inside = tl.load(x_ptr + (row - back).to(tl.int64) * x_stride + d, mask=is_channel & (index > 0), other=0.0)
    from_tail = is_channel & (index == 0) & (back <= BEFORE)
    tail = tl.load(tail_ptr + (segment.to(tl.int64) * BEFORE + BEFORE - back) * D + d, mask=from_tail, other=0.0)
    return inside.to(tl.float32) + tail.to(tl.float32)


@triton.jit
def _taps(weight_ptr, d, is_channel, BEFORE: tl.constexpr):
    """(w of the current token, of one before, of two, of three), float32, zero where the convolution is narrower."""
    at = weight_ptr + d * (BEFORE + 1) + BEFORE
    w0 = tl.load(at, mask=is_channel, other=0.0).to(tl.float32)
    w1 = tl.load(at - 1, mask=is_channel & (BEFORE >= 1), other=0.0).to(tl.float32)
    w2 = tl.load(at - 2, mask=is_channel & (BEFORE >= 2), other=0.0).to(tl.float32)
    w3 = tl.load(at - 3, mask=is_channel & (BEFORE >= 3), other=0.0).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def _section_of(ptr_0, ptr_1, ptr_2, stride_0, stride_1, stride_2, channel, SECTIONS: tl.constexpr):
    """(pointer, first channel, numbers between rows) of the section that holds `channel`; several lie one after the
    other and have contiguous rows."""
    ptr, first, stride = ptr_0, channel * 0, stride_0
    if SECTIONS > 1:  # chosen, not branched to: Triton 3.6 loses the alignment of pointers after a branch
        second, third = channel >= stride_0, channel >= stride_0 + stride_1
        ptr = tl.where(third, ptr_2, tl.where(second, ptr_1, ptr_0))
        first = tl.where(third, stride_0 + stride_1, tl.where(second, stride_0, 0))
        stride = tl.where(third, stride_2, tl.where(second, stride_1, stride_0))
    return ptr, first, stride


@triton.jit
def _three_before(x_ptr, tail_ptr, row, index, segment, d, real, D, x_stride, BEFORE: tl.constexpr):
    """The inputs one, two and three tokens before `row`."""
    x1 = _before(x_ptr, tail_ptr, row, 1, index, segment, d, real, D, x_stride, BEFORE)
    x2 = _before(x_ptr, tail_ptr, row, 2, index, segment, d, real, D, x_stride, BEFORE)
    x3 = _before(x_ptr, tail_ptr, row, 3, index, segment, d, real, D, x_stride, BEFORE)
    return x1, x2, x3


@triton.jit
def _load_row(ptr, at, stride, d, mask):
    return tl.load(ptr + at * stride + d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_silu(ptr, at, stride, d, mask, z):
    tl.store(ptr + at * stride + d, (z / (1.0 + tl.exp(-z))).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_gradient(dy, z):
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return dy * sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def _store_row(ptr, at, stride, d, mask, x):
    tl.store(ptr + at * stride + d, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(x_ptr, weight_ptr, tail_ptr, strips_ptr, y_ptr_0, y_ptr_1, y_ptr_2, D, x_stride,
                    y_stride_0, y_stride_1, y_stride_2, BEFORE: tl.constexpr, CHANNELS: tl.constexpr,
                    SECTIONS: tl.constexpr):
    """y [M, D] in its sections. Registers: four inputs and four taps of [CHANNELS]."""
    blocks = tl.cdiv(D, CHANNELS)  # one axis of programs: a second has room for 65,535, 4.2 million tokens
    strip, channels = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = block_entry(strips_ptr, strip, START)
    count = block_entry(strips_ptr, strip, COUNT)
    index = block_entry(strips_ptr, strip, INDEX)
    segment = block_entry(strips_ptr, strip, SEGMENT)
    d = channels * CHANNELS + tl.arange(0, CHANNELS)
    y_ptr, first, y_stride = _section_of(y_ptr_0, y_ptr_1, y_ptr_2, y_stride_0, y_stride_1, y_stride_2,
                                         channels * CHANNELS, SECTIONS)
    own = d - first
    is_channel = d < D
    real = is_channel & (count > 0)
    w0, w1, w2, w3 = _taps(weight_ptr, d, is_channel, BEFORE)
    x1, x2, x3 = _three_before(x_ptr, tail_ptr, row, index, segment, d, real, D, x_stride, BEFORE)
    for i in tl.range(0, count, 4):
        at = (row + i).to(tl.int64)
        a0 = _load_row(x_ptr, at, x_stride, d, is_channel)
        a1 = _load_row(x_ptr, at + 1, x_stride, d, is_channel & (i + 1 < count))
        a2 = _load_row(x_ptr, at + 2, x_stride, d, is_channel & (i + 2 < count))
        a3 = _load_row(x_ptr, at + 3, x_stride, d, is_channel & (i + 3 < count))
        _store_silu(y_ptr, at, y_stride, own, is_channel, w0 * a0 + w1 * x1 + w2 * x2 + w3 * x3)
        _store_silu(y_ptr, at + 1, y_stride, own, is_channel & (i + 1 < count), w0 * a1 + w1 * a0 + w2 * x1 + w3 * x2)
        _store_silu(y_ptr, at + 2, y_stride, own, is_channel & (i + 2 < count), w0 * a2 + w1 * a1 + w2 * a0 + w3 * x1)
        _store_silu(y_ptr, at + 3, y_stride, own, is_channel & (i + 3 < count), w0 * a3 + w1 * a2 + w2 * a1 + w3 * a0)
        x3, x2, x1 = a1, a2, a3


@triton.jit
def _backward_kernel(x_ptr, weight_ptr, tail_ptr, dy_ptr_0, dy_ptr_1, dy_ptr_2, strips_ptr, dx_ptr, dtail_ptr,
                     weight_part_ptr, D, x_stride, dy_stride_0, dy_stride_1, dy_stride_2, dx_stride,
                     BEFORE: tl.constexpr, CHANNELS: tl.constexpr, SECTIONS: tl.constexpr):
    """dx [M, D] of dy in its sections, dtail [N, BEFORE, D], weight_part [strips, D, W] as the weight has its taps.

    Registers: seven inputs, four dz, three partial dx, four taps and their gradients of [CHANNELS]. With
    tokens i to i + 3 the gradients of inputs i - 3 to i are complete.
    """
    blocks = tl.cdiv(D, CHANNELS)  # one axis of programs: a second has room for 65,535, 4.2 million tokens
    strip, channels = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = block_entry(strips_ptr, strip, START)
    count = block_entry(strips_ptr, strip, COUNT)
    index = block_entry(strips_ptr, strip, INDEX)
    following = block_entry(strips_ptr, strip, FOLLOWING)
    segment = block_entry(strips_ptr, strip, SEGMENT)
    ahead = 0
    if following > 0:  # the next strip of the document, perhaps short
        ahead = tl.minimum(block_entry(strips_ptr, strip + 1, COUNT), 3)
    d = channels * CHANNELS + tl.arange(0, CHANNELS)
    dy_ptr, first, dy_stride = _section_of(dy_ptr_0, dy_ptr_1, dy_ptr_2, dy_stride_0, dy_stride_1, dy_stride_2,
                                           channels * CHANNELS, SECTIONS)
    own = d - first
    is_channel = d < D
    real = is_channel & (count > 0)
    w0, w1, w2, w3 = _taps(weight_ptr, d, is_channel, BEFORE)
    x1, x2, x3 = _three_before(x_ptr, tail_ptr, row, index, segment, d, real, D, x_stride, BEFORE)
    # c1, c2, c3: what earlier groups gave to the gradients of the inputs one, two and three tokens back
    # (sums, not the dz themselves: Triton 3.7 drops a shift register whose first elements are equal)
    zero = tl.zeros((CHANNELS,), tl.float32)
    c1, c2, c3 = zero, zero, zero
    dw0, dw1, dw2, dw3 = zero, zero, zero, zero
    steps = tl.where(count > 0, count + 3, 0)
    for i in tl.range(0, steps, 4):
        at = (row + i).to(tl.int64)
        end = count + ahead
        a0 = _load_row(x_ptr, at, x_stride, d, is_channel & (i < end))
        a1 = _load_row(x_ptr, at + 1, x_stride, d, is_channel & (i + 1 < end))
        a2 = _load_row(x_ptr, at + 2, x_stride, d, is_channel & (i + 2 < end))
        a3 = _load_row(x_ptr, at + 3, x_stride, d, is_channel & (i + 3 < end))
        g0 = _load_row(dy_ptr, at, dy_stride, own, is_channel & (i < end))
        g1 = _load_row(dy_ptr, at + 1, dy_stride, own, is_channel & (i + 1 < end))
        g2 = _load_row(dy_ptr, at + 2, dy_stride, own, is_channel & (i + 2 < end))
        g3 = _load_row(dy_ptr, at + 3, dy_stride, own, is_channel & (i + 3 < end))
        g0 = _silu_gradient(g0, w0 * a0 + w1 * x1 + w2 * x2 + w3 * x3)
        g1 = _silu_gradient(g1, w0 * a1 + w1 * a0 + w2 * x1 + w3 * x2)
        g2 = _silu_gradient(g2, w0 * a2 + w1 * a1 + w2 * a0 + w3 * x1)
        g3 = _silu_gradient(g3, w0 * a3 + w1 * a2 + w2 * a1 + w3 * a0)
        dx3, dx2, dx1 = c3 + w3 * g0, c2 + w2 * g0 + w3 * g1, c1 + w1 * g0 + w2 * g1 + w3 * g2
        _store_row(dx_ptr, at - 3, dx_stride, d, is_channel & (i > 0) & (i - 3 < count), dx3)
        _store_row(dx_ptr, at - 2, dx_stride, d, is_channel & (i > 0) & (i - 2 < count), dx2)
        _store_row(dx_ptr, at - 1, dx_stride, d, is_channel & (i > 0) & (i - 1 < count), dx1)
        _store_row(dx_ptr, at, dx_stride, d, is_channel & (i < count), w0 * g0 + w1 * g1 + w2 * g2 + w3 * g3)
        if (i == 0) & (index == 0):  # before a document's first token: the gradient of its tail
            tail = segment.to(tl.int64) * BEFORE
            _store_row(dtail_ptr, tail + BEFORE - 3, D, d, is_channel & (BEFORE >= 3), dx3)
            _store_row(dtail_ptr, tail + BEFORE - 2, D, d, is_channel & (BEFORE >= 2), dx2)
            _store_row(dtail_ptr, tail + BEFORE - 1, D, d, is_channel & (BEFORE >= 1), dx1)
        c3, c2, c1 = w0 * g1 + w1 * g2 + w2 * g3, w0 * g2 + w1 * g3, w0 * g3
        g0, g1 = tl.where(i < count, g0, 0.0), tl.where(i + 1 < count, g1, 0.0)
        g2, g3 = tl.where(i + 2 < count, g2, 0.0), tl.where(i + 3 < count, g3, 0.0)
        dw0 += g0 * a0 + g1 * a1 + g2 * a2 + g3 * a3
        dw1 += g0 * x1 + g1 * a0 + g2 * a1 + g3 * a2
        dw2 += g0 * x2 + g1 * x1 + g2 * a0 + g3 * a1
        dw3 += g0 * x3 + g1 * x2 + g2 * x1 + g3 * a0
        x3, x2, x1 = a1, a2, a3
    part = weight_part_ptr + (strip.to(tl.int64) * D + d) * (BEFORE + 1) + BEFORE
    tl.store(part, dw0, mask=is_channel)
    tl.store(part - 1, dw1, mask=is_channel & (BEFORE >= 1))
    tl.store(part - 2, dw2, mask=is_channel & (BEFORE >= 2))
    tl.store(part - 3, dw3, mask=is_channel & (BEFORE >= 3))


class ShortConv(torch.autograd.Function):
    """(tail after, y of each section) of flat tokens; saves its inputs only."""

    @staticmethod
    def forward(ctx, x_MD, weight_DW, cu_seqlens, tail_NJD, equal_length: bool, return_tail: bool,
                dx_buffer: GradBuffer | None, widths: tuple[int, ...]):
        tokens, channels = x_MD.shape
        strips = block_table(cu_seqlens, tokens, FORWARD_STRIP, equal_length)
        sections = [x_MD.new_empty(tokens, width) for width in widths]
        tile = _channels(widths)
        _forward_kernel[(cdiv(channels, tile) * strips.count,)](
            x_MD, weight_DW, tail_NJD, strips.entries, *_three(sections), channels, x_MD.stride(0),
            *_three([y.stride(0) for y in sections]), BEFORE=weight_DW.shape[1] - 1, CHANNELS=tile,
            SECTIONS=len(widths), num_warps=1)
        ctx.save_for_backward(x_MD, weight_DW, cu_seqlens, tail_NJD)
        ctx.equal_length, ctx.dx_buffer, ctx.widths = equal_length, dx_buffer, widths
        ctx.set_materialize_grads(False)  # nobody's tail has no gradient, and costs no copy of dx
        return _tail_after(x_MD, cu_seqlens, tail_NJD) if return_tail else None, *sections

    @staticmethod
    @first_order
    def backward(ctx, dafter_NJD, *dsections):
        x_MD, weight_DW, cu_seqlens, tail_NJD = ctx.saved_tensors
        (tokens, channels), width = x_MD.shape, weight_DW.shape[1]
        tile = _channels(ctx.widths)
        blocks = cdiv(channels, tile)
        long = tokens // LONG_BACKWARD_STRIP * blocks >= ENOUGH_PROGRAMS
        strips = block_table(cu_seqlens, tokens, LONG_BACKWARD_STRIP if long else BACKWARD_STRIP, ctx.equal_length)
        dys = [x_MD.new_zeros(tokens, n) if dy is None else dy for dy, n in zip(dsections, ctx.widths, strict=True)]
        dys = [dy if dy.stride(1) == 1 and (len(dys) == 1 or dy.is_contiguous()) else dy.contiguous() for dy in dys]
        dx_MD = gradient_rows(ctx.dx_buffer, lambda x: x.reshape(x_MD.shape), x_MD, x_MD.device)
        dtail_NJD = torch.zeros_like(tail_NJD)  # documents without tokens have no strip
        parts = torch.empty(strips.count, channels, width, dtype=torch.float32, device=x_MD.device)
        _backward_kernel[(blocks * strips.count,)](
            x_MD, weight_DW, tail_NJD, *_three(dys), strips.entries, dx_MD, dtail_NJD, parts, channels, x_MD.stride(0),
            *_three([dy.stride(0) for dy in dys]), dx_MD.stride(0), BEFORE=width - 1, CHANNELS=tile,
            SECTIONS=len(dys), num_warps=1)
        dweight_DW = sum_parts(parts, weight_DW.dtype)
        if dafter_NJD is not None and width > 1:
            source = _source_of_tail(cu_seqlens, tail_NJD)
            rows = torch.cat([dx_MD, dtail_NJD.flatten(0, 1).to(dx_MD.dtype)])
            rows.index_add_(0, source, dafter_NJD.flatten(0, 1).to(dx_MD.dtype))
            dx_MD, dtail_NJD = rows[:tokens], rows[tokens:].view_as(dtail_NJD).to(tail_NJD.dtype)
        return dx_MD, dweight_DW, None, dtail_NJD, None, None, None, None


def short_conv_triton(x_MD: Tensor, weight_DW: Tensor, cu_seqlens: Tensor, tail_NJD: Tensor, *,
                      widths: tuple[int, ...], equal_length: bool = False, return_tail: bool = True,
                      dx_buffer: GradBuffer | None = None) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """(y of each section, tail after); equal_length: all documents are of one length. Sections as
    `in_one_launch` takes them."""
    if not x_MD.numel():
        return x_MD.split(widths, 1), tail_NJD
    after, *sections = ShortConv.apply(contiguous_columns(x_MD), weight_DW.contiguous(), cu_seqlens,
                                       tail_NJD.contiguous(), equal_length, return_tail, dx_buffer, widths)
    return tuple(sections), after


def in_one_launch(widths: tuple[int, ...]) -> bool:
    """Whether these sections go together: a program's channels must lie in one of them."""
    return len(widths) <= SECTIONS and (len(widths) == 1 or _channels(widths) >= LEAST_CHANNELS)


def _channels(widths: tuple[int, ...]) -> int:
    """Of a program: as many as divide every section; one section may end within a program."""
    return CHANNELS if len(widths) == 1 else math.gcd(CHANNELS, *widths)


def _three(things: list) -> list:
    """The kernels' three arguments; a missing one is not read."""
    return things + [things[0]] * (SECTIONS - len(things))


def _source_of_tail(cu_seqlens: Tensor, tail_NJD: Tensor) -> Tensor:
    """[N * J] rows of cat([x, tail]) that the tails after the call hold."""
    segments, before = tail_NJD.shape[:2]
    back = torch.arange(before, 0, -1, device=cu_seqlens.device)
    row = cu_seqlens[1:, None] - back
    length = cu_seqlens.diff()[:, None]
    segment = torch.arange(segments, device=cu_seqlens.device)[:, None]
    in_tail = cu_seqlens[-1] + segment * before + (before - back + length)
    return torch.where(back <= length, row, in_tail).flatten()


def _tail_after(x_MD: Tensor, cu_seqlens: Tensor, tail_NJD: Tensor) -> Tensor:
    segments, before, channels = tail_NJD.shape
    source = _source_of_tail(cu_seqlens, tail_NJD)
    tokens = x_MD.shape[0]
    from_x = x_MD[source.clamp(max=tokens - 1)]
    from_tail = tail_NJD.flatten(0, 1)[(source - tokens).clamp(min=0)] if before else from_x
    return torch.where((source < tokens)[:, None], from_x, from_tail.to(x_MD.dtype)).view(segments, before, channels)
