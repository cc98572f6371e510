"""What one layer keeps from its forward pass for its backward pass, in bytes, term by term.

Every term is a tensor that some autograd function of the layer saves: Megatron's layer and linears (Transformer
Engine's save the same), hola_kernels' Triton functions, in experts Megatron's fused SwiGLU. Views share their
storage, copies do not: the fused projection is kept whole by the convolutions and the output norm, which read parts
of it. `tests/plan` counts the storages of a real layer.
Not modelled: the kernels' torch backend, which keeps more (`Share.kernels_problem`).

Letters: M tokens of a micro-batch on this rank, D width, H heads of this rank, K and V a head's key and value width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hola_megatron.config import Recipe
from hola_megatron.model.padding import projection_padding, projection_rows

CHUNK = 64                    # tokens of a chunk of the state kernels (hola_kernels.gated_delta)
SCALES = 8                    # float32 numbers a token and head that a chunk keeps
MULTIPROCESSORS = 132         # of an H100 or H200: how many programs run side by side decides where sequences are split
SPLIT_GAIN, LEAST_SPAN = 2.5, 16  # when hola_kernels splits a sequence, and the chunks a span has at least
KEPT_WIDTH = 128              # up to which, in 16 bits, the forward pass keeps every chunk's state (keeps_states)
KERNEL_WIDTHS = (64, 128, 256)    # key and value widths the state kernels take
FLOAT32 = 4
SCORE_BYTES = 12              # what Megatron's router keeps of a token and expert: a score, a place in a sorted list
VISIT_BYTES = 24              # of a token and chosen expert: two indices, two weights


@dataclass(frozen=True)
class Term:
    """bytes of one saved tensor (or group of alike ones). part: "activations", "kernels" or "context"."""

    part: str
    name: str
    bytes: float


@dataclass(frozen=True)
class Share:
    """One rank's share of a layer and of a micro-batch, and the bytes of one number."""

    recipe: Recipe

    @property
    def number(self) -> int:
        return 2 if self.recipe.train.precision == "bf16" else FLOAT32

    @property
    def product(self) -> int:
        """Bytes of a number that a linear of a layer keeps of its input."""
        return 1 if self.recipe.fp8.recipe else self.number

    @property
    def tokens(self) -> int:
        train = self.recipe.train
        return train.micro_batch_size * train.sequence_length // self.recipe.parallel.context

    @property
    def norm_tokens(self) -> int:
        """Tokens that norms and residuals of this rank hold."""
        return self.tokens // (self.recipe.parallel.tensor if self.recipe.parallel.sequence else 1)

    @property
    def heads(self) -> int:
        return self.recipe.model.heads // self.recipe.parallel.tensor

    def projection(self, kind: str) -> int:
        """Width of a token's fused projection on this rank, padding included."""
        rows = projection_rows(self.recipe.model, kind, self.recipe.parallel.tensor)
        return rows + projection_padding(rows)

    @property
    def packed(self) -> bool:
        return self.recipe.data.documents == "separate"

    @property
    def interleaved(self) -> bool:
        """Several unpacked rows: tokens of a row do not lie together in memory, and are copied where they must."""
        return not self.packed and self.recipe.train.micro_batch_size > 1

    @property
    def sequences(self) -> int:
        """Sequences of full length on this rank; shorter packed documents need less."""
        return max(1, self.tokens // self.longest)

    @property
    def longest(self) -> int:
        """Tokens on this rank of its longest sequence."""
        train, context = self.recipe.train, self.recipe.parallel.context
        if self.packed:  # a row of several samples is cut in one piece: a rank may hold whole samples
            return min(train.sequence_length, self.tokens)
        return train.sequence_length // context

    @property
    def chunks(self) -> int:
        return self.sequences * math.ceil(self.longest / CHUNK)

    @property
    def spans(self) -> int:
        """Spans of all sequences; 0 where none is split."""
        model = self.recipe.model
        tile = 128 if model.value_dim > 64 and self.number == 2 else 64
        at_once = max(MULTIPROCESSORS // (self.heads * (model.value_dim // tile)), 1)
        longest = math.ceil(self.longest / CHUNK)
        span = max(math.ceil(self.chunks / at_once), LEAST_SPAN)
        return self.sequences * math.ceil(longest / span) if longest > SPLIT_GAIN * span else 0

    @property
    def kept_states(self) -> float:
        """Bytes of a layer's chunk states that its forward pass keeps."""
        model = self.recipe.model
        if self.number != 2 or max(model.key_dim, model.value_dim) > KEPT_WIDTH:
            return 0.0
        return self.chunks * self.heads * model.key_dim * model.value_dim * self.number

    @property
    def kernels_problem(self) -> str | None:
        """Why Triton's kernels would not run, so that kernels' memory is only a lower bound; None if they do."""
        model, kinds = self.recipe.model, set(self.recipe.model.layer_kinds)
        if model.backend not in ("auto", "triton"):
            return f"model.backend is {model.backend}"
        if not kinds & set("HG"):
            return None
        if model.key_dim not in KERNEL_WIDTHS or model.value_dim not in KERNEL_WIDTHS:
            return f"key_dim {model.key_dim} or value_dim {model.value_dim} is not one of 64, 128, 256"
        if model.conv_width > 4:
            return f"conv_width {model.conv_width} is above 4"
        if "H" in kinds and model.cache.score in ("recency", "random"):
            return f"score {model.cache.score} ranks by position and takes the composed path"
        return None


def saved_by_layer(share: Share, kind: str) -> list[Term]:
    """Everything a layer of this kind (H, G or A) keeps for one micro-batch."""
    model, e = share.recipe.model, share.number
    width = model.hidden_size
    shell = [Term("activations", "residual stream before each half", 2 * share.norm_tokens * width * e),
             Term("activations", "normed inputs of both halves", 2 * share.norm_tokens * width * share.product),
             Term("activations", "inverse norms", 2 * share.norm_tokens * FLOAT32),
             *(_mlp(share) if model.moe.experts is None else _experts(share))]
    return shell + (_attention(share) if kind == "A" else _delta(share, kind == "H"))


def _mlp(share: Share) -> list[Term]:
    mlp = share.recipe.model.mlp_hidden_size // share.recipe.parallel.tensor
    return [Term("activations", "MLP gate and up", 2 * share.tokens * mlp * share.number),
            Term("activations", "MLP inner product", share.tokens * mlp * share.product)]


def _experts(share: Share) -> list[Term]:
    """Megatron's router, dispatch and experts; as many tokens come to a rank as leave it, if they are used evenly."""
    model, e = share.recipe.model, share.number
    visits = share.norm_tokens * model.moe.top_k
    return [Term("activations", "router's scores", SCORE_BYTES * share.norm_tokens * model.moe.experts),
            Term("activations", "places and weights of visits", VISIT_BYTES * visits),
            Term("activations", "inputs of experts", visits * model.hidden_size * e),
            Term("activations", "experts' gate and up", 2 * visits * model.expert_hidden_size * e),
            Term("activations", "experts' inner product", visits * model.expert_hidden_size * e)]


def _delta(share: Share, exact_cache: bool) -> list[Term]:
    """The HOLA or Gated DeltaNet mixer: in DeltaMixer.mix the gates, short_conv, hola_attention, gated_rms_norm."""
    model, e, tokens, heads = share.recipe.model, share.number, share.tokens, share.heads
    key, value = heads * model.key_dim, heads * model.value_dim
    if share.interleaved:  # the convolutions keep copies, and nothing keeps the projection
        projected = Term("kernels", "inputs of the convolutions", tokens * (2 * key + value) * e)
    else:
        projected = Term("activations", "fused projection q k v gate a b", tokens * share.projection("H") * e)
    terms = [
        projected,
        Term("activations", "input of the output projection", tokens * value * share.product),
        Term("kernels", "q k v after convolution", tokens * (2 * key + value) * e),
        Term("kernels", "beta and decay", 2 * tokens * heads * FLOAT32),
        Term("kernels", "tails of the convolutions", share.sequences * (model.conv_width - 1) * (2 * key + value) * e),
        Term("kernels", "chunk scales, U and P",
             share.chunks * heads * (SCALES * CHUNK * FLOAT32 + 2 * CHUNK * CHUNK * e)),
        Term("kernels", "mixer output before its norm", tokens * value * e),
    ]
    if share.kept_states:
        terms.append(Term("kernels", "chunk states and residuals", share.kept_states + tokens * value * e))
    if share.interleaved:
        terms.append(Term("kernels", "output gate as rows of a head", tokens * value * e))
    if share.spans:
        kept = share.spans * heads * model.key_dim * (model.value_dim + model.key_dim) * FLOAT32
        terms.append(Term("kernels", "maps (transposed) and entering states of spans", kept))
    if exact_cache:
        units = share.sequences * math.ceil(share.longest / model.cache.block)
        terms += [Term("kernels", "exact read before it is added", tokens * value * e),
                  Term("kernels", "log-sums and norms of the read", 3 * tokens * heads * FLOAT32),
                  Term("kernels", "cached rows of every block", units * heads * model.cache.slots * 4)]
    return terms + (_delta_over_ranks(share, exact_cache) if share.recipe.parallel.context > 1 else [])


def _delta_over_ranks(share: Share, exact_cache: bool) -> list[Term]:
    """What context parallelism keeps besides, where one document spans all ranks (hola_megatron/parallel)."""
    model, e, heads = share.recipe.model, share.number, share.heads
    key, value, ranks = heads * model.key_dim, heads * model.value_dim, share.recipe.parallel.context
    terms = [Term("context", "maps of the ranks between", max(ranks - 2, 0) * key * model.key_dim * FLOAT32),
             Term("context", "entering states", share.sequences * key * model.value_dim * FLOAT32)]
    if not exact_cache:
        return terms
    rows = 1 if share.packed else share.recipe.train.micro_batch_size
    opened = 0 if share.longest % model.cache.block == 0 else model.cache.block - 1
    slots = model.cache.slots
    around = rows * (opened + slots) * ((key + value) * e + heads * FLOAT32)
    around += rows * slots * heads * 12  # which tokens crossed ranks: a 32-bit row and a 64-bit place
    around += rows * opened * (2 * value * e + 2 * heads * FLOAT32)  # results and norms in places nobody reads
    return [*terms, Term("context", "open block and cached tokens from other ranks", around)]


def _attention(share: Share) -> list[Term]:
    """Softmax attention: AttentionMixer.mix, rotary, scaled_dot_product_attention (flash)."""
    model, e, tokens = share.recipe.model, share.number, share.tokens
    tensor, context = share.recipe.parallel.tensor, share.recipe.parallel.context
    width, heads = model.hidden_size // tensor, model.attention_heads // tensor
    rotated = model.rope_theta is not None
    terms = [Term("activations", "input of the output projection", tokens * width * share.product),
             Term("kernels", "log-sums of the attention", tokens * heads * FLOAT32)]
    if context == 1 or not rotated:  # over ranks v is gathered and q rotated: nothing keeps the projection
        terms.append(Term("activations", "fused projection q k v", tokens * share.projection("A") * e))
    if context > 1:
        terms.append(Term("context", "keys and values of all ranks", 2 * tokens * context * width * e))
    if rotated:
        terms.append(Term("kernels", "q k after rotation", (2 if context == 1 else 1) * tokens * width * e))
        places = tokens // (1 if share.packed else share.recipe.train.micro_batch_size)
        angles = 2 * places * (model.hidden_size // model.attention_heads // 2) * FLOAT32
        terms.append(Term("kernels", "cosines and sines", angles))
    if share.interleaved or (share.packed and (context == 1 or share.sequences > 1)):
        # the documents' results are put together, or rows apart: a copy
        terms.append(Term("kernels", "attention output before it is laid out", tokens * width * e))
    return terms


def layer_workspace(share: Share, kind: str) -> float:
    """Bytes a layer's backward pass holds at once beside what was saved: the larger of its two halves."""
    model, e, tokens, heads = share.recipe.model, share.number, share.tokens, share.heads
    width = model.hidden_size
    if model.moe.experts is None:
        mlp = 3 * tokens * (model.mlp_hidden_size // share.recipe.parallel.tensor) * e  # gradients of its inside
    else:
        mlp = share.norm_tokens * model.moe.top_k * (3 * model.expert_hidden_size + 2 * width) * e
    stream = 2 * tokens * width * e  # the gradient that comes in and the one that goes out
    if kind == "A":
        return stream + max(mlp, 6 * tokens * width // share.recipe.parallel.tensor * e)
    key, value = heads * model.key_dim, heads * model.value_dim
    states = 2 * share.chunks * heads * model.key_dim * model.value_dim * e - share.kept_states  # S and dS of chunks
    keys, values = 2, 4 - (share.kept_states > 0)  # dq dk; dv dr do, and e unless it was kept
    if kind == "H" and share.recipe.parallel.context == 1:
        values -= 1  # dv lies in dr's place
    elif kind == "H":
        keys, values = keys + 2, values + 1  # the read's dq dk dv wait for the state's
    rule = (states + tokens * (keys * key + values * value) * e
            + share.chunks * heads * (3 * CHUNK * CHUNK * e + 4 * CHUNK * FLOAT32))
    units = share.sequences * math.ceil(share.longest / model.cache.block)
    tiles = math.ceil(model.cache.slots / 64) + math.ceil(model.cache.block / 64)
    pairs = units * heads * math.ceil(model.cache.block / 64) * 64 * tiles * (2 * 64 * e + FLOAT32)
    sums = units * heads * model.cache.slots * (model.key_dim + model.value_dim) * e
    read = tokens * (2 * key + 2 * value) * e + pairs + sums if kind == "H" else 0.0  # dq dk; dv do
    return stream + max(mlp, rule, read)
