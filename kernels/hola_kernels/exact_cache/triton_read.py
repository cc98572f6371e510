"""Cache attention on Triton as one differentiable operation, and the memory around it.

Kernels see one flat stream of M tokens cut into segments, and after it any cached rows that
segments carry. Without an incoming memory the stream is the caller's own tensor; with one,
every segment's open tokens are copied before its new ones, with zero queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.block_table import BlockTable, block_table
from hola_kernels.exact_cache.read_configs import read_config
from hola_kernels.exact_cache.selection_plan import SelectionPlan, selection_plan
from hola_kernels.exact_cache.torch_blocks import Selection, memory_after
from hola_kernels.exact_cache.triton_forward import launch_inverse_norms, launch_read_forward
from hola_kernels.exact_cache.triton_key_gradient import launch_key_gradient
from hola_kernels.exact_cache.triton_pair_gradient import launch_delta, launch_pair_gradient
from hola_kernels.exact_cache.triton_parameter_gradients import parameter_gradients
from hola_kernels.exact_cache.triton_query_gradient import launch_query_gradient
from hola_kernels.exact_cache.triton_select import select_slots
from hola_kernels.exact_cache.triton_window import Window
from hola_kernels.norms import RMS_EPS
from hola_kernels.operation import first_order
from hola_kernels.options import CacheOptions
from hola_kernels.segments import cut_blocks, dense_cu_seqlens
from hola_kernels.state import HolaState


@dataclass(frozen=True)
class CacheBlocks:
    """The token stream cut into blocks, and what each block's cache is chosen from."""

    table: BlockTable
    plan: SelectionPlan
    options: CacheOptions
    incoming: bool

    @property
    def slots(self) -> int:
        return self.options.slots

    @property
    def window(self) -> Window:
        return Window.of(self.options)

    @classmethod
    def cut(cls, cu_seqlens: Tensor, tokens: int, options: CacheOptions, *, equal_length: bool,
            incoming: bool = False) -> CacheBlocks:
        """M tokens cut at cu_seqlens [N + 1] int64 on the device, and then every C tokens.

        equal_length: all segments have M / N tokens. incoming: segments carry a cache.
        """
        table = block_table(cu_seqlens, tokens, options.block, equal_length)
        plan = selection_plan(cu_seqlens, tokens, options, table.count, equal_length=equal_length, incoming=incoming)
        return cls(table, plan, options, incoming and options.slots > 0)


class CacheAttention(torch.autograd.Function):
    """y = o_state + sigmoid(gate) o_cache, or o_cache where gate is None. Saves o_cache, lse and the keys' norms."""

    @staticmethod
    def forward(ctx, q, k, v, gamma_q, gamma_k, sink, gate, o_state, slots_UHw, blocks: CacheBlocks):
        mean, eps = norm_of(blocks.options.read_norm, k.shape[-1])
        key_norm = launch_inverse_norms(x_MHD=k, mean=mean, eps=eps)
        config = read_config(k.shape[-1], v.shape[-1], k.dtype)
        y, o_cache, lse, query_norm = launch_read_forward(
            q_MHK=q, k_RHK=k, v_RHV=v, key_norm_RH=key_norm, gamma_q=gamma_q, gamma_k=gamma_k, sink_H=sink,
            gate_H=gate, o_state_MHV=o_state, slots_UHw=slots_UHw, table=blocks.table, mean=mean,
            incoming=blocks.incoming, tile=config.forward, eps=eps, window=blocks.window)
        ctx.save_for_backward(q, k, v, gamma_q, gamma_k, sink, gate, key_norm, o_cache, lse, query_norm, slots_UHw)
        ctx.blocks, ctx.mean = blocks, mean
        ctx.state_dtype = None if o_state is None else o_state.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        q, k, v, gamma_q, gamma_k, sink, gate, key_norm, o_cache, lse, query_norm, slots_UHw = ctx.saved_tensors
        dq, dk, dv, dgamma_q, dgamma_k, dsink, dgate = cache_attention_backward(
            q=q, k=k, v=v, gamma_q=gamma_q, gamma_k=gamma_k, sink=sink, gate=gate, key_norm=key_norm,
            o_cache=o_cache, lse=lse, query_norm=query_norm, slots_UHw=slots_UHw, blocks=ctx.blocks, mean=ctx.mean,
            dy=_rows(dy))
        dstate = None if ctx.state_dtype is None else dy.to(ctx.state_dtype)
        return dq, dk, dv, dgamma_q, dgamma_k, dsink, dgate, dstate, None, None


def cache_attention_backward(*, q: Tensor, k: Tensor, v: Tensor, gamma_q: Tensor, gamma_k: Tensor, sink: Tensor | None,
                        gate: Tensor | None, key_norm: Tensor, o_cache: Tensor, lse: Tensor, query_norm: Tensor,
                        slots_UHw: Tensor, blocks: CacheBlocks, mean: float, dy: Tensor,
                        into: tuple[Tensor, Tensor, Tensor] | None = None,
                        beta: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, d gamma_q, d gamma_k, d sink, d gate).

    into: contiguous (dq, dk, dv) to add to in place; with beta [M, H] its last is x of a gradient beta x of v.
    """
    add = into is not None
    dq, dk, dv = into if add else (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    config = read_config(k.shape[-1], v.shape[-1], k.dtype)
    delta, head_part = launch_delta(dy_MHV=dy, o_cache_MHV=o_cache, lse_MH=lse, sink_H=sink, gate_H=gate)
    shared = {"q_MHK": q, "k_RHK": k, "gamma_q": gamma_q, "gamma_k": gamma_k, "slots_UHw": slots_UHw,
              "table": blocks.table, "incoming": blocks.incoming}
    pairs = launch_pair_gradient(
        v_RHV=v, dy_MHV=dy, query_norm_MH=query_norm, key_norm_RH=key_norm, gate_H=gate, lse_MH=lse, delta_MH=delta,
        tile=config.pair_gradient, window=blocks.window, **shared)
    shared |= {"pairs": pairs, "mean": mean, "add": add}
    gamma_part = launch_query_gradient(query_norm_MH=query_norm, dq_MHK=dq, tile=config.query_gradient, **shared)
    launch_key_gradient(key_norm_RH=key_norm, dy_MHV=dy, gate_H=gate, dk_RHK=dk, dv_RHV=dv, beta_MH=beta,
                        tile=config.key_gradient, **shared)
    parameters = parameter_gradients(gamma_part=gamma_part, head_part=head_part, gamma_q=gamma_q, gamma_k=gamma_k,
                                     sink_H=sink, gate_H=gate)
    return dq, dk, dv, *parameters


def cache_attention_combine(*, q: Tensor, k: Tensor, v: Tensor, score: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                       sink: Tensor | None, gate: Tensor | None, o_state: Tensor | None, blocks: CacheBlocks) -> Tensor:
    """Select and read flat tokens without an incoming memory: o_state + sigmoid(gate) * o_cache, [M, H, V].

    q, k [M, H, K], v, o_state [M, H, V], score [M, H]; gate None: o_cache alone. Differentiable.
    """
    slots_UHw = select_slots(score_MH=score.detach().float().contiguous(), plan=blocks.plan, slots=blocks.slots)
    o_state = None if o_state is None else _rows(o_state)
    return CacheAttention.apply(_rows(q), _rows(k), _rows(v), *_vectors(gamma_q, gamma_k, sink, gate), o_state,
                                slots_UHw, blocks)


def _vectors(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """As the kernels take them, number by number: strided and expanded ones are copied."""
    return tuple(None if x is None else x.contiguous() for x in parameters)


def norm_mean(read_norm: str, key_dim: int) -> float:
    """The factor before the sum of squares: RMSNorm takes their mean, the L2 norm their sum."""
    return 1.0 / key_dim if read_norm == "rms" else 1.0


def norm_of(read_norm: str, key_dim: int) -> tuple[float, float]:
    """(mean, eps) of a row's inverse norm 1 / sqrt(mean |x|^2 + eps), which is one where there is no norm."""
    return (0.0, 1.0) if read_norm == "none" else (norm_mean(read_norm, key_dim), RMS_EPS)


def cache_attention_triton(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, gamma_q: Tensor,
                           gamma_k: Tensor, sink_H: Tensor | None, options: CacheOptions, cu_seqlens: Tensor,
                           memory: HolaState, *, fresh: bool, equal_length: bool) -> tuple[Tensor, HolaState]:
    """Same contract as `torch_blocks.cache_attention_blocks`; fresh: the memory holds nothing yet."""
    tokens, heads = score_MH.shape
    segments, slots, device = cu_seqlens.numel() - 1, memory.slots, q_MHK.device
    order, stream_cu_seqlens = None, cu_seqlens
    q, k, v, score = q_MHK, k_MHK, v_MHV, score_MH.detach().float()
    incoming = {}
    if not fresh:
        order, stream_cu_seqlens = _open_before_new(cu_seqlens, memory)
        equal_length = False
        q = torch.cat([q, q.new_zeros(memory.open_k.flatten(0, 1).shape)])[order]
        k, v, score = (torch.cat([x, y.flatten(0, 1).to(x.dtype)])[order] for x, y in (
            (k, memory.open_k), (v, memory.open_v), (score, memory.open_score)))
        cached_row = k.shape[0] + torch.arange(segments * slots, device=device, dtype=torch.int32)
        cached_row = cached_row.view(segments, 1, slots).expand(-1, heads, -1)
        incoming = {"incoming_rows": torch.where(memory.cache_position >= 0, cached_row, -1),
                    "incoming_score": memory.cache_score.float().contiguous()}
        k, v = (torch.cat([x, y.transpose(1, 2).flatten(0, 1).to(x.dtype)]) for x, y in (
            (k, memory.cache_k), (v, memory.cache_v)))
    blocks = CacheBlocks.cut(stream_cu_seqlens, q.shape[0], options, equal_length=equal_length, incoming=not fresh)
    slots_UHw = select_slots(score_MH=score.contiguous(), plan=blocks.plan, slots=slots, final=True, **incoming)
    o = CacheAttention.apply(_rows(q), _rows(k), _rows(v), *_vectors(gamma_q, gamma_k, sink_H), None, None, slots_UHw,
                             blocks)
    if order is not None:
        row = torch.empty(tokens, dtype=torch.int64, device=device)
        is_new = order < tokens
        row[order[is_new]] = torch.nonzero(is_new).squeeze(1)
        o = o[row]
    padded = cut_blocks(cu_seqlens, memory.block, memory.open_count, memory.open_k.shape[1])
    final = _as_selection_rows(slots_UHw[blocks.table.count:].long(), q.shape[0], order, padded.empty)
    selection = Selection(padded, final[:0], torch.where(final < 0, padded.empty + segments * slots, final))
    return o, memory_after(k_MHK, v_MHV, score_MH, selection, memory)


def continue_read_triton(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, score_BTH: Tensor, gamma_q: Tensor,
                         gamma_k: Tensor, sink_H: Tensor | None, options: CacheOptions, memory: HolaState,
                         open_tokens: int) -> Tensor:
    """o_cache [B, T, H, V] of B sequences that go on from a memory, each with `open_tokens` tokens in its open block.

    The open tokens are copied before the new ones; every row's index follows from shapes and that one number.
    """
    (rows, length, heads), slots, device = score_BTH.shape, memory.slots, q_BTHK.device
    stream = rows * (open_tokens + length)

    def concat(before: Tensor, new: Tensor, *after: Tensor) -> Tensor:
        pieces = [x for row in range(rows) for x in (before[row, :open_tokens], new[row])]
        return torch.cat([x.to(new.dtype) for x in (*pieces, *after)])

    k = concat(memory.open_k, k_BTHK, memory.cache_k.transpose(1, 2).flatten(0, 1))
    v = concat(memory.open_v, v_BTHV, memory.cache_v.transpose(1, 2).flatten(0, 1))
    q = concat(q_BTHK.new_zeros(rows, open_tokens, *q_BTHK.shape[2:]), q_BTHK)
    score = concat(memory.open_score.float(), score_BTH.detach().float())
    cached_row = stream + torch.arange(rows * slots, device=device, dtype=torch.int32).view(rows, 1, slots)
    blocks = CacheBlocks.cut(dense_cu_seqlens(rows, open_tokens + length, device), stream, options, equal_length=True,
                             incoming=True)
    slots_UHw = select_slots(
        score_MH=score, plan=blocks.plan, slots=slots, incoming_score=memory.cache_score.float().contiguous(),
        incoming_rows=torch.where(memory.cache_position >= 0, cached_row.expand(-1, heads, -1), -1))
    o = CacheAttention.apply(q, k, v, *_vectors(gamma_q, gamma_k, sink_H), None, None, slots_UHw, blocks)
    return o.view(rows, open_tokens + length, heads, -1)[:, open_tokens:]


def _open_before_new(cu_seqlens: Tensor, memory: HolaState) -> tuple[Tensor, Tensor]:
    """(order, cu_seqlens) of the stream of open and new tokens: rows M + n * (1 + P) * C + p are open ones.

    Waits for the device.
    """
    starts, open_rows = cu_seqlens.tolist(), memory.open_k.shape[1]
    pieces, bounds = [], [0]
    for n, count in enumerate(memory.open_count.tolist()):
        open_row = starts[-1] + n * open_rows
        pieces += [torch.arange(open_row, open_row + count), torch.arange(starts[n], starts[n + 1])]
        bounds.append(bounds[-1] + count + starts[n + 1] - starts[n])
    return torch.cat(pieces).to(cu_seqlens.device), torch.tensor(bounds, device=cu_seqlens.device)


def _as_selection_rows(rows: Tensor, stream: int, order: Tensor | None, empty: int) -> Tensor:
    """Rows of the stream (cached ones after it) as `Selection` numbers them; -1 stays."""
    if order is None:
        return rows
    of_token = order[rows.clamp(0, max(stream - 1, 0))] if stream else rows
    return torch.where(rows >= stream, rows - stream + empty, torch.where(rows < 0, -1, of_token))


def _rows(x: Tensor) -> Tensor:
    """x [M, H, D] whose rows of H * D numbers are contiguous (they may be columns of a larger matrix)."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
