"""Kernels of the HOLA layer: torch (and Triton, where there is a GPU), nothing else.

Every operation has a reference (token by token, float64-capable: the definition) and
faster backends with the same signature and the same numbers.
"""

from hola_kernels.attention import exact_attention, hola_attention
from hola_kernels.attention_step import exact_attention_step, hola_attention_step
from hola_kernels.errors import KernelError
from hola_kernels.exact_cache import cache_ages, exact_read, exact_read_only, read_mass, select_cache
from hola_kernels.gated_delta import gated_delta_rule
from hola_kernels.gated_delta.state_map import entering_gradient, state_map
from hola_kernels.gated_delta.step import gated_delta_step
from hola_kernels.gated_norm import gated_rms_norm
from hola_kernels.kept_attention import KeptTokens, kept_attention, kept_attention_step
from hola_kernels.memo import recording
from hola_kernels.packed import PackedDocuments
from hola_kernels.short_conv import short_conv, short_conv_step
from hola_kernels.state import HolaState

__all__ = ["HolaState", "KeptTokens", "KernelError", "PackedDocuments", "cache_ages", "entering_gradient",
           "exact_attention", "exact_attention_step", "exact_read", "exact_read_only", "gated_delta_rule",
           "gated_delta_step", "gated_rms_norm", "hola_attention", "hola_attention_step", "kept_attention",
           "kept_attention_step", "read_mass", "recording", "select_cache", "short_conv", "short_conv_step",
           "state_map"]
