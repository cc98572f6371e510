"""Infinite and missing numbers stay in their document: what others compute is the same bit for bit.

One document (or row of a batch) gets an inf or NaN in its first token, in one input after the other. The lengths are no
multiples of a tile, so that tiles of the document before it hold the bad token.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import LONG
from interpreted import INTERPRETED

from hola_kernels import (
    entering_gradient,
    exact_read,
    gated_delta_rule,
    gated_rms_norm,
    hola_attention,
    kept_attention,
    short_conv,
)
from hola_kernels import state_map as map_of
from hola_kernels.cross_entropy import cross_entropy_, softmax_statistics
from hola_kernels.gates import decay_and_strength
from hola_kernels.rms_norm import rms_norm
from hola_kernels.swiglu import swiglu
from hola_kernels.verify_cases import attention_inputs

BACKENDS = ["triton"] if INTERPRETED else ["reference", "torch"]
BAD = (math.nan, math.inf)
CU_SEQLENS, VICTIM = (0, 1, 70, 90, 165), 2  # documents; of the third the first token is spoiled
STATE = ("q", "k", "v", "log_decay", "beta")
TOKENS = {"hola_attention": STATE, "gated_delta_rule": STATE, "exact_read": ("q", "k", "v", "score"),
          "kept_attention": ("q", "k", "v", "log_weight"), "short_conv": ("x",)}
SIZES = {"block": 32, "slots": 8}


def inputs_of(operation: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    made = {n: x.detach() for n, x in attention_inputs(rows, length, 1, 64, 64, torch.float32, 0, "cpu").items()}
    if operation == "short_conv":
        return {"x": made["q"].flatten(2), "weight": made["q"].flatten()[:256].view(64, 4)}
    if operation == "exact_read":
        made["score"] = made.pop("beta")
        return {n: made[n] for n in ("q", "k", "v", "score", "gamma_q", "gamma_k", "sink")}
    if operation == "kept_attention":
        made["log_weight"] = made.pop("log_decay")
        return {n: made[n] for n in ("q", "k", "v", "log_weight", "sink")}
    return made if operation == "hola_attention" else {n: made[n] for n in TOKENS[operation]}


def run(operation: str, inputs: dict[str, torch.Tensor], backend: str, **options) -> dict[str, torch.Tensor]:
    """Output and gradients of the tokens, all [B, T, ...]."""
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    function = {"hola_attention": hola_attention, "gated_delta_rule": gated_delta_rule, "exact_read": exact_read,
                "kept_attention": kept_attention, "short_conv": short_conv}[operation]
    if operation in ("hola_attention", "exact_read"):
        options |= SIZES
    if operation == "kept_attention":  # the first token of every document and row among them
        options["keep"] = torch.ones(inputs["log_weight"].shape, dtype=torch.bool)
        options["keep"][:, 3::5] = False
    y = function(**leaves, backend=backend, **options)
    y = y[0] if isinstance(y, tuple) else y
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    wanted = [n for n in TOKENS[operation] if n != "score"]
    found = torch.autograd.grad(y, [leaves[n] for n in wanted], dy)
    return {"y": y.detach(), **{f"d {n}": d for n, d in zip(wanted, found, strict=True)}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", TOKENS)
def test_other_documents_are_the_same_bits(operation, backend):
    inputs = inputs_of(operation, 1, CU_SEQLENS[-1])
    others = torch.ones(CU_SEQLENS[-1], dtype=torch.bool)
    others[CU_SEQLENS[VICTIM]:CU_SEQLENS[VICTIM + 1]] = False
    check(operation, inputs, backend, lambda x: x[:, others], (0, CU_SEQLENS[VICTIM]),
          cu_seqlens=torch.tensor(CU_SEQLENS))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", TOKENS)
def test_other_rows_are_the_same_bits(operation, backend):
    """Rows whose length is no multiple of 64: the first one's last tile holds the second one's first tokens."""
    check(operation, inputs_of(operation, 2, 70), backend, lambda x: x[:1], (1, 0))


def check(operation, inputs, backend, select, index, **options):
    clean = {n: select(x) for n, x in run(operation, inputs, backend, **options).items()}
    assert all(x.isfinite().all() for x in clean.values())
    for name in TOKENS[operation]:
        for bad in spoiling(name, backend):
            spoiled = {n: x.clone() for n, x in inputs.items()}
            spoiled[name][index] = bad
            found = run(operation, spoiled, backend, **options)
            wrong = [n for n, x in clean.items() if not torch.equal(select(found[n]), x)]
            assert not wrong, f"{bad} in {name} reached other documents' {wrong}"


def spoiling(name: str, backend: str) -> tuple[float, ...]:
    """The definition takes a second a case: one of two kinds of numbers, without --long."""
    bad = BAD if name != "log_decay" else (math.nan, -math.inf)
    return bad if backend != "reference" or LONG else bad[:1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_of_other_rows_are_the_same_bits(backend):
    """What context ranks exchange."""
    x = inputs_of("gated_delta_rule", 2, 70)

    def both(x):
        matrix, addition = map_of(**{n: x[n] for n in ("k", "v", "log_decay", "beta")}, backend=backend)
        gradient = entering_gradient(**{n: x[n] for n in ("q", "k", "log_decay", "beta")}, do=x["v"], backend=backend)
        return [y[:1] for y in (matrix, addition, gradient)]

    clean = both(x)
    for name in x:
        spoiled = {n: y.clone() for n, y in x.items()}
        spoiled[name][1, 0] = math.nan
        assert all(torch.equal(a, b) for a, b in zip(both(spoiled), clean, strict=True)), name


if INTERPRETED:
    def test_spans_of_other_documents_are_the_same_bits(monkeypatch):
        from hola_kernels.gated_delta import triton_rule

        monkeypatch.setattr(triton_rule, "span_chunks", lambda *_: 1)
        test_other_documents_are_the_same_bits("gated_delta_rule", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_mix(backend):
    """Norms, gates, SwiGLU and the cross-entropy: the row before a bad one, outputs and gradients."""
    torch.manual_seed(0)
    per_head = torch.randn(2)
    labels = torch.arange(9)
    calls = {"gated": lambda x: gated_rms_norm(x=x, gate=x * 0.5, weight=torch.ones(64), backend=backend),
             "rms": lambda x: rms_norm(x=x, weight=torch.ones(64), backend=backend),
             "swiglu": lambda x: swiglu(x=x, backend=backend),
             "gates": lambda x: torch.cat(decay_and_strength(x=x, heads=2, A_log=per_head, dt_bias=per_head,
                                                              backend=backend), -1),
             "statistics": lambda x: torch.stack(softmax_statistics(logits=x, labels=labels, backend=backend)),
             "losses": lambda x: cross_entropy_(logits=x, labels=labels, weight=None, backend=backend)[:, None]}
    base = torch.randn(9, 64)
    for name, call in calls.items():
        for bad in BAD:
            found = []
            for value in (0.5, bad):
                x = base.clone()
                x[4, 3] = value
                x.requires_grad_(name not in ("statistics", "losses"))
                y = call(x)
                gradient = torch.autograd.grad(y, x, torch.ones_like(y))[0] if x.requires_grad else x
                y = y.T if name == "statistics" else y
                found.append([torch.cat([z[:4], z[5:]]) for z in (y.detach(), gradient)])
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), (name, bad)
