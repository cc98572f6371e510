"""Functions of a Gated DeltaNet mixer that the profiler times, with the part of each."""

from __future__ import annotations

from collections.abc import Iterator

MIXER = "hola_megatron.layers.gdn.mixer"


def timed_functions() -> Iterator[tuple[str, str, str]]:
    """(module, name of the function in that module, part)."""
    yield MIXER, "short_conv", "convolution"
    yield MIXER, "conv_tail", "convolution"
    yield MIXER, "send_conv_tail", "convolution"
    yield MIXER, "decay_and_strength", "gates and layout"
    yield MIXER, "gated_delta_rule", "state"
    yield MIXER, "gated_delta_over_ranks", "state"
    yield MIXER, "start_state_exchange", "state"
    yield MIXER, "gated_rms_norm", "output norm"
    yield "hola_megatron.parallel.context", "_state_pass", "state"
