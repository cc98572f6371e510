"""Layers as plain torch modules: no Megatron, no transformers."""

from hola_kernels.modules.cache import LayerCache
from hola_kernels.modules.gated_delta_net import GatedDeltaNet
from hola_kernels.modules.gated_delta_product import GatedDeltaProduct
from hola_kernels.modules.ham_attention import HamAttention
from hola_kernels.modules.hola_attention import HolaAttention
from hola_kernels.modules.hqlt_attention import HqltAttention
from hola_kernels.modules.parts import GatedRMSNorm, ShortConvolution

__all__ = ["GatedDeltaNet", "GatedDeltaProduct", "GatedRMSNorm", "HamAttention", "HolaAttention", "HqltAttention",
           "LayerCache", "ShortConvolution"]
