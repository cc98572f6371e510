"""Configuration of a HOLA language model. Travels with exported weights; needs transformers only."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

STEP_WIDTHS, STEP_TAPS = (16, 32, 64, 128, 256), 4  # what the kernels of a decoded token take


class HolaConfig(PretrainedConfig):
    """Shape of the network, as in a recipe's model section.

    vocab_size, hidden_size, intermediate_size, num_hidden_layers: rows of the embedding, width of the
        residual stream, width inside the SwiGLU MLP, number of layers.
    layer_pattern: one letter a layer, repeated to fill all layers: H HOLA, G Gated DeltaNet (no exact
        cache), A softmax attention.
    num_heads, key_dim, value_dim, conv_width, decay: heads of H and G layers, widths of one head, width of
        the short convolution, whether the state decays (False is DeltaNet).
    num_attention_heads, rope_theta: heads of A layers, their rotary base (None for no positions).
    cache_block (C), cache_slots (w), cache_score, cache_read_norm, cache_sink, cache_gate_init: the exact
        memory of H layers.
    norm_eps, initializer_range, tie_word_embeddings: as elsewhere in transformers.
    max_position_embeddings: the length of the training samples. H and G layers have no limit.
    backend: kernels of H and G layers, "auto", "torch", "triton" or "reference".
    cuda_graph: on a GPU, record a decoded token once and replay it; needs the package hola_kernels and Triton, and no
        A layers. Without a GPU nothing is recorded.
    """

    model_type = "hola"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers reads it as a class attribute)

    def __init__(self, vocab_size: int = 32000, hidden_size: int = 1024, intermediate_size: int = 2816,
                 num_hidden_layers: int = 24, layer_pattern: str = "H", num_heads: int = 4, key_dim: int = 256,
                 value_dim: int = 256, conv_width: int = 4, decay: bool = True, num_attention_heads: int = 16,
                 rope_theta: float | None = 10000.0, cache_block: int = 256, cache_slots: int = 64,
                 cache_score: str = "betae", cache_read_norm: str = "rms", cache_sink: bool = True,
                 cache_gate_init: float = -4.0, norm_eps: float = 1e-6, initializer_range: float = 0.02,
                 max_position_embeddings: int = 2048, use_cache: bool = True, backend: str = "auto",
                 cuda_graph: bool = False, tie_word_embeddings: bool = True, bos_token_id: int | None = None,
                 eos_token_id: int | None = None, pad_token_id: int | None = None, **kwargs: Any):
        if not layer_pattern or set(layer_pattern) - set("HGA"):
            raise ValueError(f"layer_pattern: {layer_pattern!r} must be of the letters H, G and A")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.layer_pattern = layer_pattern
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.conv_width = conv_width
        self.decay = decay
        self.num_attention_heads = num_attention_heads
        self.rope_theta = rope_theta
        self.cache_block = cache_block
        self.cache_slots = cache_slots
        self.cache_score = cache_score
        self.cache_read_norm = cache_read_norm
        self.cache_sink = cache_sink
        self.cache_gate_init = cache_gate_init
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.backend = backend
        self.cuda_graph = cuda_graph
        self.check_cuda_graph()
        # set before and after: 4.57 takes them as arguments, later versions as attributes of the subclass
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, bos_token_id=bos_token_id,
                         eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)

    def check_cuda_graph(self) -> None:
        """Raises ValueError where a decoded token cannot be recorded. Again when a model is made: from_pretrained sets
        what it is given after the configuration has been read."""
        if self.cuda_graph and (why := self._unrecordable()):
            raise ValueError(f"cuda_graph: {why}; leave it off")

    def _unrecordable(self) -> str | None:
        if "A" in self.layer_kinds:
            return "the memory of A layers grows with every token, and a recording has fixed sizes"
        if "H" in self.layer_kinds and self.cache_score not in ("betae", "e", "betav"):
            return f"cache_score {self.cache_score!r} is not one of betae, e, betav"
        for name in ("key_dim", "value_dim"):
            if getattr(self, name) not in STEP_WIDTHS:
                return f"{name} {getattr(self, name)} is none of {', '.join(map(str, STEP_WIDTHS))}"
        if self.conv_width > STEP_TAPS:
            return f"conv_width {self.conv_width} is over {STEP_TAPS}"
        return None if self.backend in ("auto", "triton") else f"backend {self.backend!r} reads lengths on the host"

    @property
    def layer_kinds(self) -> str:
        """One letter a layer."""
        return (self.layer_pattern * self.num_hidden_layers)[: self.num_hidden_layers]
