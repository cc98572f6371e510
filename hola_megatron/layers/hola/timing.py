"""Functions of a HOLA mixer's exact cache that the profiler times, with the part of each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

FUNCTIONS = (
    ("hola_megatron.parallel.context", "rank_tokens", "selection"),
    ("hola_megatron.parallel.context", "entering_memory", "selection"),
    ("hola_megatron.parallel.context", "exact_read_only", "read"),
    ("hola_megatron.parallel.context", "merge_outputs", "read"),
    ("hola_kernels.attention", "gated_delta_rule", "state"),
    ("hola_kernels.attention", "rank_tokens", "selection"),
    ("hola_kernels.attention", "exact_read", "read"),
    ("hola_kernels.attention", "exact_read_only", "read"),
    ("hola_kernels.attention", "merge_outputs", "read"),
    ("hola_kernels.exact_cache.torch_blocks", "select_tokens", "selection"),
)
# the same where Triton is installed: its autograd functions combine state, selection and read
TRITON_FUNCTIONS = (
    ("hola_kernels.triton_attention", "rule_forward", "state"),
    ("hola_kernels.triton_attention", "rule_backward", "state"),
    ("hola_kernels.triton_attention", "rank_scores", "selection"),
    ("hola_kernels.triton_attention", "select_slots", "selection"),
    ("hola_kernels.triton_attention", "launch_read_forward", "read"),
    ("hola_kernels.triton_attention", "cache_attention_backward", "read"),
    ("hola_kernels.exact_cache.triton_read", "select_slots", "selection"),
    *(("hola_megatron.parallel.fused_layer", name, part) for part, names in (
        ("state", ("intra_chunk", "state_pass", "final_map", "grad_initial_state", "state_pass_backward",
                   "intra_chunk_backward", "fold_left", "fold_right", "maps_between")),
        ("selection", ("rank_scores", "best_rows", "select_slots", "merge", "send_candidates")),
        ("read", ("launch_inverse_norms", "launch_local_read", "launch_cached_read", "cache_attention_backward",
                  "_add_sent_gradients")),
    ) for name in names),
)


def timed_functions() -> Iterator[tuple[str, str, str]]:
    """(module, name of the function in that module, part)."""
    yield from FUNCTIONS
    if importlib.util.find_spec("triton") is not None:
        yield from TRITON_FUNCTIONS
