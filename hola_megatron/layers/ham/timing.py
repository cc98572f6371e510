"""Functions of a HAM mixer that the profiler times besides those of a Gated DeltaNet, with the part of each."""

from __future__ import annotations

from collections.abc import Iterator

OPERATION = "hola_kernels.ham"


def timed_functions() -> Iterator[tuple[str, str, str]]:
    """(module, name of the function in that module, part)."""
    yield OPERATION, "gated_delta_rule", "state"
    yield OPERATION, "gated_delta_residual", "routing"
    yield OPERATION, "routing_score", "routing"
    yield "hola_megatron.layers.ham.mixer", "learned_logit", "routing"
    yield OPERATION, "read_normed", "read"
    yield OPERATION, "kept_attention", "read"
