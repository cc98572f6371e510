"""The fused Triton hola_attention under the interpreter: whole operation, forward and every gradient, tiny shapes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from inputs import gradients, make_inputs, relative_error

from hola_kernels import hola_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:
    def test_under_the_interpreter():
        pytest.importorskip("triton")
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__],
                              env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
else:
    @pytest.mark.parametrize(("options", "sink"), [
        ({"cu_seqlens": [0, 1, 1, 70, 150]}, True), ({}, True), ({"score": "e", "read_norm": "l2"}, False)],
        ids=["packed", "dense", "variant"])
    def test_fused_operation_matches_the_definition(options, sink):
        length = 150 if options.get("cu_seqlens") else 80
        narrow = make_inputs(1, length, heads=2, key=64, value=64, dtype=torch.float32)
        if not sink:
            narrow["sink"] = None
        exact = {n: None if x is None else x.detach().double().requires_grad_() for n, x in narrow.items()}
        if "cu_seqlens" in options:
            options = {**options, "cu_seqlens": torch.tensor(options["cu_seqlens"], dtype=torch.int32)}
        shared = {"block": 32, "slots": 8, **options}
        found = hola_attention(**narrow, backend="triton", **shared)
        expected = hola_attention(**exact, backend="torch", **shared)
        assert "HolaAttention" in type(found.grad_fn.next_functions[0][0] if found.grad_fn.name().startswith(
            "View") else found.grad_fn).__name__
        assert relative_error(found, expected) < 1e-5
        keep = {n: x for n, x in exact.items() if x is not None}
        want, have = gradients(expected, keep), gradients(found, {n: narrow[n] for n in keep})
        errors = {n: relative_error(have[n], want[n]) for n in want if want[n].norm() > 0}
        assert max(errors.values()) < 1e-4, errors

    def test_half_precision_keeps_states_for_a_backward_pass_and_only_for_one(monkeypatch):
        from hola_kernels.gated_delta import triton_rule

        kept, walk = [], triton_rule.walk_forward
        monkeypatch.setattr(triton_rule, "walk_forward", lambda **x: kept.append(x["keep_states"]) or walk(**x))
        narrow = make_inputs(1, 80, heads=1, key=64, value=64, dtype=torch.float16)
        exact = {n: x.detach().double().requires_grad_() for n, x in narrow.items()}
        shared = {"block": 32, "slots": 8, "cu_seqlens": torch.tensor([0, 30, 80], dtype=torch.int32)}
        with torch.no_grad():
            hola_attention(**narrow, backend="triton", **shared)
        found = hola_attention(**narrow, backend="triton", **shared)
        assert kept == [False, True]
        expected = hola_attention(**exact, backend="torch", **shared)
        assert relative_error(found, expected) < 2e-3
        want, have = gradients(expected, exact), gradients(found, narrow)
        errors = {n: relative_error(have[n], want[n]) for n in want if want[n].norm() > 0}
        assert max(errors.values()) < 5e-3, errors
