"""The stages of `hola_attention`'s Triton kernels, for callers that exchange messages between them. Needs Triton.

    delta rule    intra_chunk -> final_map -> state_pass; backward grad_initial_state -> state_pass_backward ->
                  intra_chunk_backward
    scores        rank_scores, select_slots; best_rows for the candidates of a rank
    attention     allocate_split_read -> launch_local_read -> launch_cached_read; backward cache_attention_backward

`hola_megatron/parallel/fused_layer.py` composes all of them over context-parallel ranks. Shapes are in the functions'
docstrings.
"""

from hola_kernels.exact_cache.read_configs import read_config
from hola_kernels.exact_cache.triton_best import best_rows
from hola_kernels.exact_cache.triton_forward import launch_inverse_norms
from hola_kernels.exact_cache.triton_read import CacheBlocks, cache_attention_backward, norm_mean
from hola_kernels.exact_cache.triton_select import select_slots
from hola_kernels.exact_cache.triton_split_read import (
    SplitRead,
    allocate_split_read,
    launch_cached_read,
    launch_local_read,
)
from hola_kernels.gated_delta.triton_layout import Layout
from hola_kernels.gated_delta.triton_phases import IntraChunk, final_map, grad_initial_state, intra_chunk, state_pass
from hola_kernels.gated_delta.triton_rule import SavedTensors, intra_chunk_backward, state_pass_backward, will_train
from hola_kernels.triton_attention import rank_scores

__all__ = ["CacheBlocks", "IntraChunk", "Layout", "SavedTensors", "SplitRead", "allocate_split_read", "best_rows",
           "cache_attention_backward", "final_map", "grad_initial_state", "intra_chunk", "intra_chunk_backward",
           "launch_cached_read", "launch_inverse_norms", "launch_local_read", "norm_mean", "rank_scores", "read_config",
           "select_slots", "state_pass", "state_pass_backward", "will_train"]
