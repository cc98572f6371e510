"""HOLA language models for transformers: HOLA, Gated DeltaNet and softmax-attention layers in any pattern.

Travels with exported weights and needs torch and transformers only. The operations come from
the package hola_kernels where it is installed (with its GPU kernels), else from hola_ops.py
beside this file, which is the same source bundled into one module.

Padding is taken out, not masked: the tokens of a padded batch are packed one sequence after
the other, so a padded sequence gives what it gives alone, wherever its padding is.

Shapes: B rows, T columns of a call, M tokens that are not padding, D width, H heads, K and V
head widths, S tokens of an attention layer's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .cache_hola import AttentionMemory, DeltaMemory, HolaCache
from .configuration_hola import HolaConfig
from .decoding_hola import DecodingGraph

try:
    from hola_kernels import (
        HolaState,
        gated_delta_rule,
        gated_delta_step,
        gated_rms_norm,
        hola_attention,
        hola_attention_step,
        short_conv,
        short_conv_step,
    )
except ImportError:  # the same code, bundled with the export
    from .hola_ops import (
        HolaState,
        gated_delta_rule,
        gated_delta_step,
        gated_rms_norm,
        hola_attention,
        hola_attention_step,
        short_conv,
        short_conv_step,
    )

FLOAT32_PARAMETERS = ("A_log", "dt_bias", "gamma_q", "gamma_k", "gate", "sink")
# transformers 4 takes whole parts of a parameter's name, later versions search for a pattern ("gate" in "gate_proj")
FLOAT32_END = "" if int(transformers.__version__.split(".")[0]) < 5 else "$"


@dataclass
class Padding:
    """Which columns of a padded batch are tokens.

    valid [B, T] bool; index [M] int64: their places in the flattened batch, row by row;
    cuts [B + 1] int64 on the CPU, where the operations lay out their work: each row's first token among the M, and M.
    """

    valid: Tensor
    index: Tensor
    cuts: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor | None, columns: int) -> Padding | None:
        """Of the last `columns` columns of a [B, *] mask; None where all of them are tokens."""
        if attention_mask is None:
            return None
        if attention_mask.ndim != 2 or attention_mask.shape[1] < columns:
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must be [B, T] with 1 for tokens and 0 for "
                             f"padding, over at least the {columns} columns of this call")
        valid = attention_mask[:, -columns:].bool()
        if valid.all():
            return None
        cuts = F.pad(valid.sum(1).cumsum(0), (1, 0)).cpu()
        return cls(valid, valid.flatten().nonzero().squeeze(1), cuts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Padding:
        """On another device (a model spread over several moves it from layer to layer)."""
        return Padding(*(x.to(device, non_blocking=non_blocking) for x in (self.valid, self.index)), self.cuts)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [1, M, D]."""
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, M, D] -> [B, T, D], zeros at padding."""
        flat = packed.new_zeros(self.valid.numel(), packed.shape[2])
        return flat.index_copy(0, self.index, packed[0]).view(*self.valid.shape, -1)


def step_backend(config: HolaConfig, x: Tensor) -> str:
    """Of a decoded token; what reads nothing on the host can be recorded."""
    return "triton" if config.cuda_graph and x.is_cuda else config.backend


class ShortConvolution(nn.Module):
    """A depthwise causal convolution with SiLU; the last column of weight [D, W] multiplies the current token."""

    def __init__(self, width: int, config: HolaConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, config.conv_width))
        self.config = config

    def forward(self, x_BTD: Tensor, cuts: Tensor | None, tail: Tensor | None, decoding: bool) -> tuple[Tensor, Tensor]:
        """(y like x, tail [N, W - 1, D] of the last inputs); decoding: one token a row, `tail` updated in place."""
        if decoding and tail is not None:
            backend = step_backend(self.config, x_BTD)
            return short_conv_step(x=x_BTD[:, 0], weight=self.weight, tail=tail, backend=backend)[:, None], tail
        return short_conv(x=x_BTD, weight=self.weight, cu_seqlens=cuts, tail=tail, return_tail=True,
                          backend=self.config.backend)


class GatedNorm(nn.Module):
    """RMSNorm of every head times SiLU of its gate."""

    def __init__(self, config: HolaConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.value_dim))
        self.eps, self.backend = config.norm_eps, config.backend

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x=x, gate=gate, weight=self.weight, eps=self.eps, backend=self.backend)


class HolaDeltaMixer(nn.Module):
    """Gated DeltaNet (G), and with the exact cache the HOLA mixer (H)."""

    def __init__(self, config: HolaConfig, kind: str):
        super().__init__()
        self.config, self.exact_cache = config, kind == "H"
        width, heads = config.hidden_size, config.num_heads
        keys, values = heads * config.key_dim, heads * config.value_dim
        for name, rows in (("q", keys), ("k", keys), ("v", values), ("g", values), ("b", heads)):
            setattr(self, f"{name}_proj", nn.Linear(width, rows, bias=False))
        for name, rows in (("q", keys), ("k", keys), ("v", values)):
            setattr(self, f"{name}_conv", ShortConvolution(rows, config))
        if config.decay:
            self.a_proj = nn.Linear(width, heads, bias=False)
            self.A_log, self.dt_bias = _vector(heads), _vector(heads)
        if self.exact_cache:
            self.gamma_q, self.gamma_k, self.gate = _vector(config.key_dim), _vector(config.key_dim), _vector(heads)
            if config.cache_sink:
                self.sink = _vector(heads)
        self.o_norm = GatedNorm(config)
        self.o_proj = nn.Linear(values, width, bias=False)

    def forward(self, hidden_BTD: Tensor, padding: Padding | None, memory: DeltaMemory | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `memory` is read and brought up to date."""
        x = hidden_BTD if padding is None else padding.pack(hidden_BTD)
        decoding = memory is not None and padding is None and x.shape[1] == 1 and not torch.is_grad_enabled()
        cuts = None if padding is None else padding.cuts
        tokens = self._tokens(x, cuts, memory, decoding)
        o = self._mix_one(tokens, memory) if decoding else self._mix(tokens, cuts, memory)
        gate = self.g_proj(x).unflatten(-1, (-1, self.config.value_dim))
        out = self.o_proj(self.o_norm(o, gate).flatten(-2))
        return out if padding is None else padding.unpack(out)

    def _tokens(self, x: Tensor, cuts: Tensor | None, memory: DeltaMemory | None, decoding: bool) -> dict[str, Tensor]:
        """q, k, v [B, T, H, *], log_decay and beta [B, T, H] of every token."""
        config = self.config
        q, k, v = (self._convolved(name, x, cuts, memory, decoding) for name in "qkv")
        beta = self.b_proj(x).float().sigmoid()
        log_decay = torch.zeros_like(beta)
        if config.decay:
            log_decay = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        return {"q": q.unflatten(-1, (-1, config.key_dim)), "k": k.unflatten(-1, (-1, config.key_dim)),
                "v": v.unflatten(-1, (-1, config.value_dim)), "log_decay": log_decay, "beta": beta}

    def _convolved(self, name: str, x: Tensor, cuts: Tensor | None, memory: DeltaMemory | None,
                   decoding: bool) -> Tensor:
        """The projection `name` of x after its convolution, whose tail is kept."""
        project, convolve = getattr(self, f"{name}_proj"), getattr(self, f"{name}_conv")
        before = None if memory is None else getattr(memory, f"{name}_tail")
        y, tail = convolve(project(x), cuts, before, decoding)
        if memory is not None and tail is not before:
            setattr(memory, f"{name}_tail", tail.detach())
        return y

    def _mix(self, tokens: dict[str, Tensor], cuts: Tensor | None, memory: DeltaMemory | None) -> Tensor:
        before = None if memory is None else memory.state
        options = {"cu_seqlens": cuts, "backend": self.config.backend}
        if self.exact_cache:
            o, after = hola_attention(**tokens, **self._cache_arguments(), block=self.config.cache_block,
                                      slots=self.config.cache_slots, state=before, return_state=True, **options)
        else:
            o, _, after = gated_delta_rule(**tokens, initial_state=before, **options)
        if memory is not None:
            memory.state = after
            memory.map(Tensor.detach)
        return o

    def _mix_one(self, tokens: dict[str, Tensor], memory: DeltaMemory) -> Tensor:
        """One token of every sequence: o [B, 1, H, V]."""
        one = {name: x[:, 0] for name, x in tokens.items()}
        if memory.state is None:
            memory.state = self._empty_state(one["v"])
        where = {"state": memory.state, "backend": step_backend(self.config, one["v"])}
        if self.exact_cache:
            return hola_attention_step(**one, **self._cache_arguments(), **where)[:, None]
        o, _ = gated_delta_step(**one, **where)
        return o.to(one["v"].dtype)[:, None]

    def _empty_state(self, v_BHV: Tensor) -> HolaState | Tensor:
        config = self.config
        state = HolaState.empty(v_BHV.shape[0], config.num_heads, config.key_dim, config.value_dim, dtype=v_BHV.dtype,
                                block=config.cache_block, slots=config.cache_slots, device=v_BHV.device)
        return state if self.exact_cache else state.state

    def _cache_arguments(self) -> dict[str, Any]:
        return {"gamma_q": self.gamma_q, "gamma_k": self.gamma_k, "gate": self.gate,
                "sink": self.sink if self.config.cache_sink else None, "score": self.config.cache_score,
                "read_norm": self.config.cache_read_norm}


class HolaAttentionMixer(nn.Module):
    """Causal softmax attention with rotary positions (A); padding takes no position."""

    def __init__(self, config: HolaConfig):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.head_dim = width // config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, hidden_BTD: Tensor, padding: Padding | None, memory: AttentionMemory | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `memory` is read and brought up to date."""
        q, k, v = (project(hidden_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        valid = hidden_BTD.new_ones(hidden_BTD.shape[:2], dtype=torch.bool) if padding is None else padding.valid
        first = memory is None or not memory.is_initialized
        if self.config.rope_theta is not None:
            seen = 0 if first else memory.valid.sum(1, keepdim=True)
            position = (valid.cumsum(1) - 1).clamp_min(0) + seen
            q, k = (_rotate(x, position, self.config.rope_theta) for x in (q, k))
        everything = (k, v, valid) if memory is None else memory.append(k, v, valid)
        if first and padding is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v, valid = everything
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(valid, q.shape[2]))
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class HolaMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: HolaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HolaLayer(GradientCheckpointingLayer):
    """Norm, mixer, norm, MLP, with residuals."""

    def __init__(self, config: HolaConfig, kind: str):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = HolaAttentionMixer(config) if kind == "A" else HolaDeltaMixer(config, kind)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = HolaMLP(config)

    def forward(self, hidden_BTD: Tensor, padding: Padding | None = None,
                past_key_values: DeltaMemory | AttentionMemory | None = None) -> Tensor:
        """past_key_values: this layer's memory, by the name that gradient checkpointing knows and leaves out."""
        with torch.cuda.device_of(hidden_BTD):  # Triton launches on the current GPU, wherever a model's layers lie
            hidden_BTD = hidden_BTD + self.mixer(self.mixer_norm(hidden_BTD), padding, past_key_values)
        return hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))


class HolaPreTrainedModel(PreTrainedModel):
    """Start values and what transformers wants to know of every HOLA model."""

    config_class = HolaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HolaLayer"]  # noqa: RUF012  (transformers reads class attributes)
    _supports_sdpa = True
    _is_stateful = True  # the memory cannot be rolled back: no assisted decoding

    def __init__(self, config: HolaConfig, *args: Any, **kwargs: Any):
        config.check_cuda_graph()
        super().__init__(config, *args, **kwargs)
        held = set(config.layer_kinds)
        names = FLOAT32_PARAMETERS[:2] if held & set("HG") and config.decay else ()
        names += FLOAT32_PARAMETERS[2:5] if "H" in held else ()
        names += FLOAT32_PARAMETERS[5:] if "H" in held and config.cache_sink else ()
        self._keep_in_fp32_modules_strict = [name + FLOAT32_END for name in names]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start values as in training from scratch (as in GDN)."""
        config, std = self.config, self.config.initializer_range
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if name == "A_log":
                parameter.uniform_(0.0, 16.0).clamp_min_(1e-4).log_()
            elif name == "dt_bias":
                dt = parameter.uniform_(-6.907755, -2.302585).exp_().clamp_min_(1e-4)  # log-uniform in [1e-3, 0.1]
                parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif name in ("gate", "sink"):
                parameter.fill_(config.cache_gate_init if name == "gate" else 0.0)
            elif name.startswith("gamma") or isinstance(module, nn.RMSNorm | GatedNorm):
                parameter.fill_(1.0)
            elif isinstance(module, ShortConvolution):
                parameter.uniform_(-1.0, 1.0).mul_(config.conv_width**-0.5)
            else:
                parameter.normal_(0.0, std)


class HolaModel(HolaPreTrainedModel):
    """Embedding, layers, final norm."""

    def __init__(self, config: HolaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([HolaLayer(config, kind) for kind in config.layer_kinds])
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
                return_dict: bool | None = None, **_: Any) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """input_ids [B, T] or inputs_embeds [B, T, D]; attention_mask [B, T] or [B, all columns so far].

        use_cache defaults to the configuration's in evaluation and to False in training.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        padding = Padding.of(attention_mask, hidden.shape[1])
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if not wanted and padding is None and self._is_recordable(hidden, cache):
            if cache.graph is None:
                self.config.check_cuda_graph()  # it may have been set since
                cache.graph = DecodingGraph()
            # a model that was moved or got other weights has them elsewhere
            key = (id(self), self.embed_tokens.weight.data_ptr(), self.norm.weight.data_ptr())
            states = [cache.graph(lambda x: self._through_layers(x, None, cache)[-1], hidden, cache.held(), key)]
        else:
            states = self._through_layers(hidden, padding, cache)
            if cache is not None and hidden.shape[1] > 1:
                cache.graph = None  # its memories have been replaced
        if cache is not None:
            cache.seen += hidden.shape[1]
        output = BaseModelOutputWithPast(last_hidden_state=states[-1], past_key_values=cache,
                                         hidden_states=tuple(states) if wanted else None)
        return output if return_dict is not False else output.to_tuple()

    def _through_layers(self, hidden: Tensor, padding: Padding | None, cache: HolaCache | None) -> list[Tensor]:
        """The residual stream before every layer, and normalized after the last."""
        states = [hidden]
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, padding, past_key_values=None if cache is None else cache.layers[number])
            states.append(hidden)
        states[-1] = self.norm(hidden)
        return states

    def _is_recordable(self, hidden: Tensor, cache: HolaCache | None) -> bool:
        """Whether this is one token of every sequence, after others, on a GPU, with config.cuda_graph.

        Not under autocast, whose copies of the weights are gone when it ends.
        """
        return (self.config.cuda_graph and hidden.is_cuda and hidden.shape[1] == 1 and cache is not None
                and all(layer.is_initialized for layer in cache.layers) and not torch.is_grad_enabled()
                and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing())

    def _cache(self, given: Any, use_cache: bool | None) -> HolaCache | None:
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
    """HolaModel and the projection to the vocabulary."""

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
                return_dict: bool | None = None, logits_to_keep: int | Tensor = 0,
                **kwargs: Any) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """labels [B, T]: as input_ids, -100 where no loss counts; they are shifted here.

        logits_to_keep: only the last columns' logits (0 for all), or the columns of a tensor.
        """
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
                            inputs_embeds=inputs_embeds, use_cache=use_cache,
                            output_hidden_states=output_hidden_states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size,
                                      num_items_in_batch=kwargs.get("num_items_in_batch"))
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values,
                                        hidden_states=output.hidden_states)
        return result if return_dict is not False else result.to_tuple()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any,
                                      **kwargs: Any) -> None:
        """`generate` starts from an empty HolaCache instead of a cache of its own."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HolaCache(self.config)


def _vector(size: int) -> nn.Parameter:
    """One of FLOAT32_PARAMETERS."""
    return nn.Parameter(torch.empty(size, dtype=torch.float32))


def _rotate(x_BHTK: Tensor, position_BT: Tensor, theta: float) -> Tensor:
    """Rotate halves of every head by position; fp32 inside."""
    width = x_BHTK.shape[-1]
    frequency = theta ** (-torch.arange(0, width, 2, device=x_BHTK.device, dtype=torch.float32) / width)
    angle = position_BT[:, None, :, None].float() * frequency
    a, b = x_BHTK.float().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BHTK.dtype)


def _visible(valid_BS: Tensor, queries: int) -> Tensor:
    """[B, 1, T, S] bool: tokens up to each query; a padding query sees itself, so that no row is empty."""
    total = valid_BS.shape[1]
    column = torch.arange(total, device=valid_BS.device)
    row = torch.arange(total - queries, total, device=valid_BS.device)[:, None]
    return (((column <= row) & valid_BS[:, None]) | (column == row))[:, None]
