"""The Triton exact read as one differentiable operation, and the memory around it.

Kernels see one flat stream of M tokens cut into segments, and behind it any cached rows that
segments bring along. Without an incoming memory the stream is the caller's own tensor; with
one, every segment's open tokens are laid before its new ones (a copy), with zero queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.exact_cache.read_configs import read_config
from hola_kernels.exact_cache.selection_plan import SelectionPlan, selection_plan
from hola_kernels.exact_cache.torch_blocks import Selection, _memory_after
from hola_kernels.exact_cache.triton_forward import launch_inverse_norms, launch_read_forward
from hola_kernels.exact_cache.triton_key_gradient import launch_key_gradient
from hola_kernels.exact_cache.triton_pair_gradient import launch_delta, launch_pair_gradient
from hola_kernels.exact_cache.triton_parameter_gradients import parameter_gradients
from hola_kernels.exact_cache.triton_query_gradient import launch_query_gradient
from hola_kernels.exact_cache.triton_select import select_slots
from hola_kernels.segments import cut_units, dense_cu_seqlens
from hola_kernels.state import HolaState
from hola_kernels.unit_table import UnitTable, unit_table


@dataclass(frozen=True)
class Blocks:
    """The token stream cut into blocks, and what each block's cache is chosen from."""

    units: UnitTable
    plan: SelectionPlan
    slots: int
    incoming: bool

    @classmethod
    def cut(cls, cuts: Tensor, tokens: int, *, block: int, slots: int, dense: bool, incoming: bool = False) -> Blocks:
        """cuts [N + 1] int64 on the device; dense: all segments are of one length."""
        units = unit_table(cuts, tokens, block, dense)
        plan = selection_plan(cuts, tokens, block, slots, units.units, dense=dense, incoming=incoming)
        return cls(units, plan, slots, incoming)


class ExactRead(torch.autograd.Function):
    """y = o_state + sigmoid(gate) o_cache, or o_cache where gate is None. Saves o_cache, lse and the keys' norms."""

    @staticmethod
    def forward(ctx, q, k, v, gamma_q, gamma_k, sink, gate, o_state, slots_UHw, blocks: Blocks, mean: float):
        key_norm = launch_inverse_norms(x_MHD=k, mean=mean)
        config = read_config(k.shape[-1], v.shape[-1], k.dtype)
        y, o_cache, lse, query_norm = launch_read_forward(
            q_MHK=q, k_RHK=k, v_RHV=v, key_norm_RH=key_norm, gamma_q=gamma_q, gamma_k=gamma_k, sink_H=sink,
            gate_H=gate, o_state_MHV=o_state, slots_UHw=slots_UHw, units=blocks.units, mean=mean,
            incoming=blocks.incoming, tile=config.forward)
        ctx.save_for_backward(q, k, v, gamma_q, gamma_k, sink, gate, key_norm, o_cache, lse, query_norm, slots_UHw)
        ctx.blocks, ctx.mean = blocks, mean
        ctx.state_dtype = None if o_state is None else o_state.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, gamma_q, gamma_k, sink, gate, key_norm, o_cache, lse, query_norm, slots_UHw = ctx.saved_tensors
        dq, dk, dv, dgamma_q, dgamma_k, dsink, dgate = exact_read_backward(
            q=q, k=k, v=v, gamma_q=gamma_q, gamma_k=gamma_k, sink=sink, gate=gate, key_norm=key_norm,
            o_cache=o_cache, lse=lse, query_norm=query_norm, slots_UHw=slots_UHw, blocks=ctx.blocks, mean=ctx.mean,
            dy=_rows(dy))
        dstate = None if ctx.state_dtype is None else dy.to(ctx.state_dtype)
        return dq, dk, dv, dgamma_q, dgamma_k, dsink, dgate, dstate, None, None, None


def exact_read_backward(*, q: Tensor, k: Tensor, v: Tensor, gamma_q: Tensor, gamma_k: Tensor, sink: Tensor | None,
                        gate: Tensor | None, key_norm: Tensor, o_cache: Tensor, lse: Tensor, query_norm: Tensor,
                        slots_UHw: Tensor, blocks: Blocks, mean: float, dy: Tensor,
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
              "units": blocks.units, "incoming": blocks.incoming}
    pairs = launch_pair_gradient(
        v_RHV=v, dy_MHV=dy, query_norm_MH=query_norm, key_norm_RH=key_norm, gate_H=gate, lse_MH=lse, delta_MH=delta,
        tile=config.pair_gradient, **shared)
    shared |= {"pairs": pairs, "mean": mean, "add": add}
    gamma_part = launch_query_gradient(query_norm_MH=query_norm, dq_MHK=dq, tile=config.query_gradient, **shared)
    launch_key_gradient(key_norm_RH=key_norm, dy_MHV=dy, gate_H=gate, dk_RHK=dk, dv_RHV=dv, beta_MH=beta,
                        tile=config.key_gradient, **shared)
    parameters = parameter_gradients(gamma_part=gamma_part, head_part=head_part, gamma_q=gamma_q, gamma_k=gamma_k,
                                     sink_H=sink, gate_H=gate)
    return dq, dk, dv, *parameters


def exact_read_combine(*, q: Tensor, k: Tensor, v: Tensor, score: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                       sink: Tensor | None, gate: Tensor | None, o_state: Tensor | None, blocks: Blocks,
                       read_norm: str) -> Tensor:
    """Select and read flat tokens without an incoming memory: o_state + sigmoid(gate) * o_cache, [M, H, V].

    q, k [M, H, K], v, o_state [M, H, V], score [M, H]; gate None: o_cache alone. Differentiable.
    """
    slots_UHw = select_slots(score_MH=score.detach().float().contiguous(), plan=blocks.plan, slots=blocks.slots)
    o_state = None if o_state is None else _rows(o_state)
    return ExactRead.apply(_rows(q), _rows(k), _rows(v), gamma_q.contiguous(), gamma_k.contiguous(), sink, gate,
                           o_state, slots_UHw, blocks, norm_mean(read_norm, k.shape[-1]))


def norm_mean(read_norm: str, key_dim: int) -> float:
    """The factor before the sum of squares: RMSNorm takes their mean, the L2 norm their sum."""
    return 1.0 / key_dim if read_norm == "rms" else 1.0


def exact_read_triton(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                      sink_H: Tensor | None, read_norm: str, cu_seqlens: Tensor, memory: HolaState, *, fresh: bool,
                      dense: bool) -> tuple[Tensor, HolaState]:
    """Same contract as `torch_blocks.exact_read_blocks`; fresh: the memory holds nothing yet."""
    tokens, heads = score_MH.shape
    segments, slots, device = cu_seqlens.numel() - 1, memory.slots, q_MHK.device
    order, cuts = None, cu_seqlens
    q, k, v, score = q_MHK, k_MHK, v_MHV, score_MH.detach().float()
    incoming = {}
    if not fresh:
        order, cuts = _open_before_new(cu_seqlens, memory)
        dense = False
        opened = memory.open_k.flatten(0, 1)
        q = torch.cat([q, q.new_zeros(opened.shape)])[order]
        k, v, score = (torch.cat([x, y.flatten(0, 1).to(x.dtype)])[order] for x, y in (
            (k, memory.open_k), (v, memory.open_v), (score, memory.open_score)))
        cached_row = k.shape[0] + torch.arange(segments * slots, device=device, dtype=torch.int32)
        cached_row = cached_row.view(segments, 1, slots).expand(-1, heads, -1)
        incoming = {"incoming_rows": torch.where(memory.cache_position >= 0, cached_row, -1),
                    "incoming_score": memory.cache_score.float().contiguous()}
        k, v = (torch.cat([x, y.transpose(1, 2).flatten(0, 1).to(x.dtype)]) for x, y in (
            (k, memory.cache_k), (v, memory.cache_v)))
    blocks = Blocks.cut(cuts, q.shape[0], block=memory.block, slots=slots, dense=dense, incoming=not fresh)
    slots_UHw = select_slots(score_MH=score.contiguous(), plan=blocks.plan, slots=slots, final=True, **incoming)
    o = ExactRead.apply(_rows(q), _rows(k), _rows(v), gamma_q.contiguous(), gamma_k.contiguous(), sink_H, None, None,
                        slots_UHw, blocks, norm_mean(read_norm, k.shape[-1]))
    if order is not None:
        place = torch.empty(tokens, dtype=torch.int64, device=device)
        is_new = order < tokens
        place[order[is_new]] = torch.nonzero(is_new).squeeze(1)
        o = o[place]
    units = cut_units(cu_seqlens, memory.block, memory.open_count)
    final = _as_selection_rows(slots_UHw[blocks.units.units:].long(), q.shape[0], order, units.empty)
    selection = Selection(units, final[:0], torch.where(final < 0, units.empty + segments * slots, final))
    return o, _memory_after(k_MHK, v_MHV, score_MH, selection, memory)


def continue_read_triton(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, score_BTH: Tensor, gamma_q: Tensor,
                         gamma_k: Tensor, sink_H: Tensor | None, read_norm: str, memory: HolaState,
                         opened: int) -> Tensor:
    """o_cache [B, T, H, V] of B sequences that go on from a memory, each with `opened` tokens in its open block.

    The open tokens are laid before the new ones; where every row lies follows from shapes and that one number.
    """
    (rows, length, heads), slots, device = score_BTH.shape, memory.slots, q_BTHK.device
    stream = rows * (opened + length)

    def laid(before: Tensor, new: Tensor, *behind: Tensor) -> Tensor:
        pieces = [x for row in range(rows) for x in (before[row, :opened], new[row])]
        return torch.cat([x.to(new.dtype) for x in (*pieces, *behind)])

    k = laid(memory.open_k, k_BTHK, memory.cache_k.transpose(1, 2).flatten(0, 1))
    v = laid(memory.open_v, v_BTHV, memory.cache_v.transpose(1, 2).flatten(0, 1))
    q = laid(q_BTHK.new_zeros(rows, opened, *q_BTHK.shape[2:]), q_BTHK)
    score = laid(memory.open_score.float(), score_BTH.detach().float())
    cached_row = stream + torch.arange(rows * slots, device=device, dtype=torch.int32).view(rows, 1, slots)
    blocks = Blocks.cut(dense_cu_seqlens(rows, opened + length, device), stream, block=memory.block, slots=slots,
                        dense=True, incoming=True)
    slots_UHw = select_slots(
        score_MH=score, plan=blocks.plan, slots=slots, incoming_score=memory.cache_score.float().contiguous(),
        incoming_rows=torch.where(memory.cache_position >= 0, cached_row.expand(-1, heads, -1), -1))
    o = ExactRead.apply(q, k, v, gamma_q.contiguous(), gamma_k.contiguous(), sink_H, None, None, slots_UHw, blocks,
                        norm_mean(read_norm, k.shape[-1]))
    return o.view(rows, opened + length, heads, -1)[:, opened:]


def _open_before_new(cu_seqlens: Tensor, memory: HolaState) -> tuple[Tensor, Tensor]:
    """(order, cuts) of the stream of open and new tokens: rows M + n * C + p are open ones. Waits for the device."""
    tokens, block = int(cu_seqlens[-1]), memory.block
    bounds, opened = cu_seqlens.tolist(), memory.open_count.tolist()
    pieces, cuts = [], [0]
    for n, count in enumerate(opened):
        pieces += [torch.arange(tokens + n * block, tokens + n * block + count), torch.arange(bounds[n], bounds[n + 1])]
        cuts.append(cuts[-1] + count + bounds[n + 1] - bounds[n])
    device = cu_seqlens.device
    return torch.cat(pieces).to(device), torch.tensor(cuts, device=device)


def _as_selection_rows(rows: Tensor, stream: int, order: Tensor | None, empty: int) -> Tensor:
    """Rows of the stream (cached ones behind it) as `Selection` numbers them; -1 stays."""
    if order is None:
        return rows
    of_token = order[rows.clamp(0, max(stream - 1, 0))] if stream else rows
    return torch.where(rows >= stream, rows - stream + empty, torch.where(rows < 0, -1, of_token))


def _rows(x: Tensor) -> Tensor:
    """x [M, H, D] whose rows of H * D numbers are contiguous (they may lie in a wider matrix)."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
