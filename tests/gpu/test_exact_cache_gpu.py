"""The cache attention, attention to kept tokens, the short convolution, the gated norm, the gates and SwiGLU on a GPU,
against float64."""

from __future__ import annotations

import pytest

from hola_kernels.exact_cache import verify_cases as exact_cache
from hola_kernels.gated_norm import verify_cases as gated_norm
from hola_kernels.gates import verify_cases as gates
from hola_kernels.kept_attention import verify_cases as kept_attention
from hola_kernels.short_conv import verify_cases as short_conv
from hola_kernels.swiglu import verify_cases as swiglu

CASES = {name: (run, module.limit) for module in (exact_cache, kept_attention, short_conv, gated_norm, gates, swiglu)
         for name, run in module.cases()}


@pytest.mark.parametrize("name", CASES)
def test_triton_matches_float64(name):
    run, limit = CASES[name]
    errors = run()
    assert errors and not {output: error for output, error in errors.items() if not error < limit(name, output)}
