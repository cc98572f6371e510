"""Configuration of a HOLA language model. Copied into every export."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from .kinds_hola import kinds_of


class HolaConfig(PretrainedConfig):
    """Shape of the network, as in a recipe's model section.

    vocab_size, hidden_size, intermediate_size, num_hidden_layers: rows of the embedding, width of the
        residual stream, width inside the SwiGLU MLP, number of layers.
    layer_pattern: layer kinds, repeated to fill all layers, by letter ("HHHA") or by name ("hola*3, attention"):
        H hola, G gdn (Gated DeltaNet: no exact cache), A attention (softmax), W swa (softmax in a sliding window),
        hqlt, ham and deltaproduct (by name).
    num_heads, key_dim, value_dim, conv_width: heads of hola, gdn and ham layers, widths of one head, width of the short
        convolution.
    rule, beta_range: what their state does, "gdn" (it decays), "delta" (it does not: DeltaNet) or "none" (hola layers
        have no state); what the sigmoid of the write strength is multiplied by, 1 or 2. decay: an earlier name, True
        for "gdn" and False for "delta".
    delta_steps: writes a token of deltaproduct layers.
    state_delay, state_delay_mode: how late hola and gdn layers read their state, in tokens, and how ("stream", or
        "chunk": gdn layers alone).
    num_attention_heads, num_key_value_heads, attention_qk_norm, rope_theta: of attention and swa layers: query heads,
        key and value heads (None: as many), whether queries and keys are normed, rotary base (None for no positions).
    attention_window: tokens that a token of swa layers sees, itself included.
    cache_block (C), cache_slots (w), cache_local, cache_window, cache_score, cache_router_width, cache_read_norm,
        cache_rope_theta, cache_merge, cache_sink, cache_gate_init: the exact memory of hola layers.
    hqlt_blend, hqlt_window (W), hqlt_rope_theta, hqlt_mixing: the two memories of hqlt layers.
    ham_router, ham_router_width: the routing score of ham layers, "cosine" or "learned", and the inner width of a
        head's learned one. ham_share, ham_threshold, ham_rate, ham_freeze_steps: how training moves their threshold,
        which is among the weights.
    norm_eps, initializer_range, tie_word_embeddings: as elsewhere in transformers.
    max_position_embeddings: the length of the training samples. Other layers than softmax attention have no limit.
    backend: kernels of hola, gdn and ham layers, "auto", "torch", "triton" or "reference".
    cuda_graph: on a GPU, capture a decoding step once and replay it; needs the package hola_kernels and Triton, and no
        layers whose memory grows. Without a GPU nothing is captured.
    """

    model_type = "hola"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (transformers reads it as a class attribute)

    def __init__(self, vocab_size: int = 32000, hidden_size: int = 1024, intermediate_size: int = 2816,
                 num_hidden_layers: int = 24, layer_pattern: str = "H", num_heads: int = 4, key_dim: int = 256,
                 value_dim: int = 256, conv_width: int = 4, rule: str | None = None, decay: bool | None = None,
                 beta_range: int = 1, delta_steps: int = 2, state_delay: int = 0, state_delay_mode: str = "stream",
                 num_attention_heads: int = 16, num_key_value_heads: int | None = None,
                 attention_qk_norm: bool = False, attention_window: int = 1024,
                 rope_theta: float | None = 10000.0, cache_block: int = 256, cache_slots: int = 64,
                 cache_local: str = "block", cache_window: int | None = None,
                 cache_score: str = "betae", cache_read_norm: str = "rms", cache_rope_theta: float | None = None,
                 cache_merge: str = "add", cache_router_width: int = 64, cache_sink: bool = True,
                 cache_gate_init: float = -4.0, hqlt_blend: str = "sync", hqlt_window: int = 64,
                 hqlt_rope_theta: float = 10000.0, hqlt_mixing: str = "vector",
                 ham_router: str = "learned", ham_share: float = 0.5, ham_threshold: float = 0.5,
                 ham_rate: float = 0.01, ham_freeze_steps: int = 0, ham_router_width: int = 64, norm_eps: float = 1e-6,
                 initializer_range: float = 0.02, max_position_embeddings: int = 2048, use_cache: bool = True,
                 backend: str = "auto", cuda_graph: bool = False, tie_word_embeddings: bool = True,
                 bos_token_id: int | None = None,
                 eos_token_id: int | None = None, pad_token_id: int | None = None, **kwargs: Any):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.layer_pattern = layer_pattern
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.conv_width = conv_width
        if rule is not None and decay is not None and rule != ("gdn" if decay else "delta"):
            raise ValueError(f"rule: {rule!r} and decay: {decay!r} contradict each other; give rule alone")
        self.rule = rule or ("delta" if decay is False else "gdn")
        self.beta_range = beta_range
        self.delta_steps = delta_steps
        self.state_delay, self.state_delay_mode = state_delay, state_delay_mode
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.attention_qk_norm = attention_qk_norm
        self.attention_window = attention_window
        self.rope_theta = rope_theta
        self.cache_block = cache_block
        self.cache_slots = cache_slots
        self.cache_local = cache_local
        self.cache_window = cache_window
        self.cache_score = cache_score
        self.cache_read_norm = cache_read_norm
        self.cache_router_width = cache_router_width
        self.cache_rope_theta, self.cache_merge = cache_rope_theta, cache_merge
        self.cache_sink = cache_sink
        self.cache_gate_init = cache_gate_init
        self.hqlt_blend, self.hqlt_window = hqlt_blend, hqlt_window
        self.hqlt_rope_theta, self.hqlt_mixing = hqlt_rope_theta, hqlt_mixing
        self.ham_router, self.ham_router_width = ham_router, ham_router_width
        self.ham_share, self.ham_threshold = ham_share, ham_threshold
        self.ham_rate, self.ham_freeze_steps = ham_rate, ham_freeze_steps
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.backend = backend
        self.cuda_graph = cuda_graph
        try:
            kinds_of(self)
        except ValueError as error:
            raise ValueError(f"layer_pattern: {error}") from None
        if num_key_value_heads is not None and num_attention_heads % num_key_value_heads:
            raise ValueError(f"num_key_value_heads: {num_key_value_heads} does not divide num_attention_heads = "
                             f"{num_attention_heads}")
        self.check_cuda_graph()
        # set before and after: 4.57 takes them as arguments, later versions as attributes of the subclass
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, bos_token_id=bos_token_id,
                         eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)

    def check_cuda_graph(self) -> None:
        """Raises ValueError where a decoding step cannot be captured. Again when a model is made: from_pretrained sets
        what it is given after the configuration has been read."""
        if self.cuda_graph and (why := self._cuda_graph_problem()):
            raise ValueError(f"cuda_graph: {why}; leave it off")

    def _cuda_graph_problem(self) -> str | None:
        return next((why for kind in kinds_of(self) if (why := kind.cuda_graph_problem(self))), None)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The name of every layer's kind."""
        return tuple(kind.name for kind in kinds_of(self))
