"""What one rank makes of a case of context_ranks.py, and how far the ranks together are from it."""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from context_ranks import SHARED, Case, gradients_with
from inputs import relative_error
from torch import Tensor

from hola_kernels import HolaState, gated_delta_rule, hola_attention, short_conv
from hola_kernels.attention import rank_tokens
from hola_kernels.checks import segments_of
from hola_kernels.gated_delta.residual import gated_delta_residual

Result = tuple[Tensor, Tensor | None, dict[str, Tensor]]


def one_rank(case: Case) -> Result:
    """(o, what the cache ranks by, gradients) of the whole rows."""
    inputs, cuts = case.inputs(), case.cu_seqlens
    score = None
    if case.what == "conv":
        o = short_conv(**inputs, cu_seqlens=cuts, backend=case.backend)
    elif case.what == "attention":
        o = softmax_attention(**inputs, cuts=cuts, **case.options)
    elif case.what == "gdn":
        o, score, _ = gated_delta_rule(**inputs, cu_seqlens=cuts, backend=case.backend)
    else:
        o = hola_attention(**inputs, cu_seqlens=cuts, backend=case.backend, **asdict(case.choices))
        score = ranks_of(case, inputs)
    return o, score, gradients_with(o, case.projection.to(o), inputs)


def ranks_of(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    tokens = {n: inputs[n].detach() for n in ("q", "k", "v", "log_decay", "beta")}
    _, written, _ = gated_delta_rule(**tokens, cu_seqlens=case.cu_seqlens, backend=case.backend)
    cuts = segments_of(written, case.cu_seqlens)
    tokens.pop("q")
    residual = gated_delta_residual(**tokens, cu_seqlens=case.cu_seqlens, backend=case.backend)
    return rank_tokens(case.choices.score, written, tokens["v"], tokens["beta"], cuts,
                       torch.zeros(cuts.numel() - 1, dtype=torch.int64, device=written.device), residual=residual)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, cuts: Tensor | None, window: int | None = None) -> Tensor:
    bounds = [0, q.shape[1]] if cuts is None else cuts.tolist()
    place, parts = torch.arange(q.shape[1], device=q.device), []
    back = place[:, None] - place
    seen = (back >= 0) & (back < (window or q.shape[1]))
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        if b > a:
            document = (x[:, a:b].transpose(1, 2) for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*document, attn_mask=seen[: b - a, : b - a]))
    return torch.cat(parts, 2).transpose(1, 2)


def joined(ranks: list[dict], case: Case) -> Result:
    """The ranks' parts put together; gradients of shared parameters added up."""
    o = torch.cat([r["o"] for r in ranks], 1)
    score = torch.cat([r["score"] for r in ranks], 1) if "score" in ranks[0] else None
    gradients = {}
    for name in ranks[0]["gradients"]:
        every = [r["gradients"][name] for r in ranks]
        gradients[name] = sum(every) if name in SHARED else torch.cat(every, 1)
    return o, score, gradients


def differences(ranks: list[dict], want: Result, case: Case) -> dict[str, float]:
    """Relative errors of outputs, scores and gradients: the ranks' parts together against one rank."""
    have = joined(ranks, case)
    measured = {"o": relative_error(have[0], want[0])}
    if have[1] is not None:
        measured["score"] = relative_error(have[1], want[1])
    return measured | {f"d{n}": relative_error(have[2][n], d) for n, d in want[2].items()}


def memory_before(case: Case, rank: int) -> HolaState:
    """What one rank remembers of a part's first document when the part begins."""
    part, inputs = case.part(rank), {n: x.detach() for n, x in case.inputs().items()}
    before = slice(part.start - part.before, part.start)
    past = {n: x if n in SHARED else x[:, before] for n, x in inputs.items()}
    backend = case.backend if part.before else "torch"  # no tokens at all
    return hola_attention(**past, return_state=True, backend=backend, **asdict(case.choices))[1]


def check_memory(memory: HolaState, want: HolaState, tolerance: float) -> None:
    """The same tokens in the same places, their numbers within the tolerance."""
    for field in ("length", "cache_position"):
        assert torch.equal(getattr(memory, field), getattr(want, field)), field
    for field in ("state", "cache_k", "cache_v", "cache_score", "open_k", "open_v", "open_score"):
        have, expected = getattr(memory, field), getattr(want, field)
        assert have.shape == expected.shape and have.dtype == expected.dtype
        filled = expected.isfinite()
        assert torch.equal(have.isfinite(), filled), field
        error = (have - expected)[filled].norm() if filled.any() else torch.zeros(())
        assert error <= tolerance * expected[filled].norm().clamp_min(1e-30), field
