"""The stages of the operations, for callers that exchange state between them (context parallelism).

    rank_tokens, rank_without_state, routed_values        scores of the cache, of a layer with and without a state;
                                values through which a learned score is trained
    gated_delta_residual        e of every token, for the score cosine
    learned_logit               logits of a learned score
    merge_outputs               state output and cache attention, joined
    with_positions              queries and keys of the read, with rotary positions where the options ask for them
    is_fused                    whether hola_attention runs as one autograd function on Triton kernels (triton_stages)
    segments_of, dense_cu_seqlens        cu_seqlens of packed documents, or of equal rows
    mark_constant, memoise      tables that are computed once for a tensor
    first_order                 decorator of a backward pass that has no derivative

The public operations (`hola_kernels`) are compositions of these stages. Triton's own are in `triton_stages`.
"""

from hola_kernels.attention import is_fused, rank_tokens, rank_without_state, routed_values
from hola_kernels.checks import segments_of
from hola_kernels.gated_delta.residual import gated_delta_residual
from hola_kernels.kept_attention.controller import learned_logit
from hola_kernels.memo import mark_constant, memoise
from hola_kernels.merge import merge_outputs
from hola_kernels.operation import first_order
from hola_kernels.options import POSITION_SCORES, CacheOptions
from hola_kernels.positions import with_positions
from hola_kernels.segments import dense_cu_seqlens

__all__ = ["POSITION_SCORES", "CacheOptions", "dense_cu_seqlens", "first_order", "gated_delta_residual", "is_fused",
           "learned_logit", "mark_constant", "memoise", "merge_outputs", "rank_tokens", "rank_without_state",
           "routed_values", "segments_of", "with_positions"]
