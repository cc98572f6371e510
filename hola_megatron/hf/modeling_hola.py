"""HOLA language models for transformers: HOLA, Gated DeltaNet and softmax-attention layers in any pattern.

Copied into every export; imports torch and transformers only. The layers are in layers_hola.py, which says where
their operations come from, the packing of padded rows and of documents in packing_hola.py, the memory of decoding in
cache_hola.py. Made for transformers 4.57 and later, whose keyword for the memory is `past_key_values`, since 5.24
`cache`; both are taken. A keyword that is not understood is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hola_megatron.layers.exported.packing_hola import DOCUMENT_KEYWORDS, Packing, refuse_unknown

from .cache_hola import CACHE, HolaCache
from .configuration_hola import HolaConfig
from .decoding_hola import DecodingGraph
from .kinds_hola import kinds_of
from .layers_hola import HolaLayer

# transformers 4 takes whole parts of a parameter's name, later versions search for a pattern ("gate" in "gate_proj")
FLOAT32_END = "" if int(transformers.__version__.split(".")[0]) < 5 else "$"


class HolaPreTrainedModel(PreTrainedModel):
    """Initialisation, and the attributes that transformers reads of every HOLA model."""

    config_class = HolaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HolaLayer"]  # noqa: RUF012  (transformers reads class attributes)
    _supports_sdpa = True
    _is_stateful = True  # the memory cannot be rolled back: no assisted decoding

    def __init__(self, config: HolaConfig, *args: Any, **kwargs: Any):
        config.check_cuda_graph()
        super().__init__(config, *args, **kwargs)
        self._keep_in_fp32_modules_strict = [name + FLOAT32_END for name in float32_parameters(config)]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values, as in training."""
        initial = next((kind.initial for kind in kinds_of(self.config) if type(module) is kind.mixer), {})
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if isinstance(module, nn.Linear | nn.Embedding):
                parameter.normal_(0.0, self.config.initializer_range)
            elif name in initial:
                initial[name](parameter, self.config)
            else:  # a part of one weight: a norm, a convolution
                module.reset_parameters()


def float32_parameters(config: HolaConfig) -> tuple[str, ...]:
    """Names of mixers' parameters that stay float32 in a 16-bit model."""
    return tuple(dict.fromkeys(name for kind in kinds_of(config) for name in kind.float32(config)))


class HolaModel(HolaPreTrainedModel):
    """Embedding, layers, final norm."""

    def __init__(self, config: HolaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([HolaLayer(config, kind) for kind in kinds_of(config)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                past_key_values: HolaCache | None = None, inputs_embeds: Tensor | None = None,
                use_cache: bool | None = None, output_hidden_states: bool | None = None,
                return_dict: bool | None = None, cache: HolaCache | None = None,
                **documents: Any) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """input_ids [B, T] or inputs_embeds [B, T, D]; attention_mask [B, T] or [B, all columns so far].

        past_key_values or cache: state to continue from. use_cache defaults to the configuration's in evaluation and
        to False in training and for rows of several documents. documents: see HolaForCausalLM.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        given = one_memory(past_key_values, cache)
        seen = given.get_seq_length() if given is not None else 0
        others = {name: x for name, x in documents.items() if name not in DOCUMENT_KEYWORDS}
        refuse_unknown(others, seen, hidden.shape[1])
        packing = Packing.of(attention_mask, hidden, documents, seen)
        cache = self._cache(given, use_cache, packing)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if not wanted and packing is None and self._can_use_graph(hidden, cache):
            if cache.graph is None:
                self.config.check_cuda_graph()  # it may have been set since
                cache.graph = DecodingGraph()
            # a model that was moved or got other weights has them elsewhere
            key = (id(self), self.embed_tokens.weight.data_ptr(), self.norm.weight.data_ptr())
            states = [cache.graph(lambda x: self._through_layers(x, None, cache)[-1], hidden, cache.tensors(), key)]
        else:
            states = self._through_layers(hidden, packing, cache)
            if cache is not None and hidden.shape[1] > 1:
                cache.graph = None  # its memories have been replaced
        if cache is not None:
            cache.seen += hidden.shape[1]
        output = BaseModelOutputWithPast(last_hidden_state=states[-1], **{CACHE: cache},
                                         hidden_states=tuple(states) if wanted else None)
        return output if return_dict is not False else output.to_tuple()

    def _through_layers(self, hidden: Tensor, packing: Packing | None, cache: HolaCache | None) -> list[Tensor]:
        """The residual stream before every layer, and normalized after the last."""
        states = [hidden]
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, packing, **{CACHE: None if cache is None else cache.layers[number]})
            states.append(hidden)
        states[-1] = self.norm(hidden)
        return states

    def _can_use_graph(self, hidden: Tensor, cache: HolaCache | None) -> bool:
        """Whether this is one token of every sequence, after others, on a GPU, with config.cuda_graph.

        Not under autocast, whose copies of the weights are gone when it ends.
        """
        return (self.config.cuda_graph and hidden.is_cuda and hidden.shape[1] == 1 and cache is not None
                and all(layer.is_initialized for layer in cache.layers) and not torch.is_grad_enabled()
                and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing())

    def _cache(self, given: Any, use_cache: bool | None, packing: Packing | None) -> HolaCache | None:
        if packing is not None and packing.position is not None:
            if given is not None or use_cache:
                raise ValueError("use_cache: a row of several documents leaves no single state to continue from; "
                                 "give False")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if isinstance(given, HolaCache):
            return given
        if given is not None and given.get_seq_length():
            raise ValueError(f"past_key_values must be a HolaCache, not {type(given).__name__} with tokens in it")
        return HolaCache(self.config) if use_cache else None


class HolaForCausalLM(HolaPreTrainedModel, GenerationMixin):
    """HolaModel and the output projection."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HolaConfig):
        super().__init__(config)
        self.model = HolaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                past_key_values: HolaCache | None = None, inputs_embeds: Tensor | None = None,
                labels: Tensor | None = None, use_cache: bool | None = None, output_hidden_states: bool | None = None,
                return_dict: bool | None = None, logits_to_keep: int | Tensor = 0, cache: HolaCache | None = None,
                position_ids: Tensor | None = None, seq_idx: Tensor | None = None,
                cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
                max_length_q: int | None = None, max_length_k: int | None = None, cu_seqlens: Tensor | None = None,
                **kwargs: Any) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """labels [B, T]: as input_ids, -100 where there is no loss; they are shifted here.

        logits_to_keep: only the last columns' logits (0 for all), or the columns of a tensor.
        past_key_values or cache: the state to continue from.

        Rows of several documents, which are independent, by any of these, which must be consistent: position_ids [B, T]
        increase by one and restart with every document; seq_idx [B, T] numbers the documents; cu_seq_lens_q and
        cu_seq_lens_k, or cu_seqlens, [N + 1] are the first columns of the documents of one row, and its end.
        No document's first token is predicted then. There is no state to continue from after such a call.

        Raises ValueError for inputs that contradict each other, TypeError for a keyword that is not understood.
        """
        counted = kwargs.pop("num_items_in_batch", None)
        given = {"position_ids": position_ids, "seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q,
                 "cu_seq_lens_k": cu_seq_lens_k, "max_length_q": max_length_q, "max_length_k": max_length_k,
                 "cu_seqlens": cu_seqlens}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
                            past_key_values=one_memory(past_key_values, cache), use_cache=use_cache,
                            output_hidden_states=output_hidden_states, **given, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            packing = Packing.of(attention_mask, output.last_hidden_state, given, 0)
            labels = labels if packing is None else packing.without_first_labels(labels)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size,
                                      num_items_in_batch=counted)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: output.get(CACHE)},
                                        hidden_states=output.hidden_states)
        return result if return_dict is not False else result.to_tuple()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any,
                                      **kwargs: Any) -> None:
        """`generate` starts from an empty HolaCache instead of a cache of its own."""
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = HolaCache(self.config)


def one_memory(past_key_values: Any, cache: Any) -> Any:
    """The cache given under either of its names. Raises ValueError for two different ones."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two memories; give one of them")
    return past_key_values if cache is None else cache
