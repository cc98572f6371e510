"""The schema of recipes: every field, its default, its limits and its meaning. A `Recipe` is frozen."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints
from pydantic.dataclasses import dataclass

from hola_megatron.layers.registry import KINDS, expand, parse_pattern
from hola_megatron.layers.spec import LayerKind
from hola_megatron.recipe.problems import SET_NAME

SetName = Annotated[str, StringConstraints(pattern=rf"^{SET_NAME.pattern}$")]
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _known_pattern(pattern: str) -> str:
    parse_pattern(pattern)
    return pattern


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CacheConfig:
    """The exact cache of a HOLA layer, and the attention to it."""

    block: int = Field(256, ge=1, description="tokens per cache block (C): the cache is updated at the end of each")
    slots: int = Field(64, ge=0, description="tokens of earlier blocks in the exact cache per head (w); 0: no cache")
    local: Literal["block", "window", "none"] = Field("block", description=(
        "what a token attends to besides the cache: its own block up to itself, a sliding window, or itself"))
    window: int | None = Field(None, ge=1, description=(
        "tokens of the sliding window, the token itself included; with local: window"))
    score: Literal["betae", "e", "betav", "recency", "random", "cosine", "learned"] = Field("betae", description=(
        "score that selects tokens: size of the state update (betae), an ablation, how far the state's answer points "
        "away from the value (cosine), or a small network of the layer's input per head (learned)"))
    router_width: int = Field(64, ge=1, description="score learned: inner width of a head's network")
    read_norm: Literal["rms", "l2", "none"] = Field("rms", description=(
        "norm of q and k in the cache attention: learned scale (rms), unit length (l2), or none"))
    rope_theta: float | None = Field(None, gt=0, description=(
        "rotary base of the cache attention's queries and keys; null: no positions"))
    merge: Literal["add", "convex", "two"] = Field("add", description=(
        "how the state's output and the cache attention's are joined: o_state + sigmoid(gate) o_cache (add); one "
        "sigmoid of the token a channel, c and 1 - c (convex); two sigmoids of the token a head (two)"))
    sink: bool = Field(True, description="one learned logit per head with value zero")
    gate_init: float = Field(-4.0, description="initial value of the cache attention's gate, before its sigmoid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HqltConfig:
    """Layers of kind hqlt (arXiv 2506.00744): a delta-rule state without decay and a softmax window, from the same q, k
    and v. Sizes are model.heads, key_dim and value_dim."""

    blend: Literal["sync", "delayed_stream", "delayed_chunk"] = Field("sync", description=(
        "sync: the state has seen every token; delayed_stream: only those that have left the window; delayed_chunk: "
        "only those before a token's chunk, whose tokens alone its softmax sees"))
    window: int = Field(64, ge=1, description="tokens of the softmax window (of the chunk), the reading one included")
    rope_theta: float = Field(10000.0, gt=0, description="rotary base of the softmax part")
    mixing: Literal["sum", "scalar", "vector"] = Field("vector", description=(
        "how the two reads are joined: their sum; two sigmoids a head; one sigmoid a channel, g and 1 - g"))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HamConfig:
    """Layers of kind ham (arXiv 2603.22325): a Gated DeltaNet state, and the tokens whose routing score reaches a
    threshold, kept exactly. Sizes are model.heads, key_dim and value_dim."""

    router: Literal["cosine", "learned"] = Field("learned", description=(
        "routing score: cosine, how far the state's answer points away from the value (0 to 2), or a small network of "
        "the layer's input per head (0 to 1)"))
    share: float = Field(0.5, ge=0, le=1, description="share of (tokens x heads) that is kept, which the threshold of "
                                                      "every layer follows")
    threshold: float = Field(0.5, description="the threshold before the first step")
    rate: float = Field(0.01, ge=0, description="a step adds rate x (share of its tokens that was kept - share) to it")
    freeze_steps: int = Field(0, ge=0, description="first steps that leave the threshold as it is")
    router_width: int = Field(64, ge=1, description="inner width of a head's learned router")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoeConfig:
    """Mixture of experts instead of every layer's MLP: Megatron-core's router, dispatch and experts."""

    experts: int | None = Field(None, ge=2, description="experts of a layer; null: one MLP, no router")
    top_k: int = Field(2, ge=1, description="experts per token")
    hidden_size: int | None = Field(None, ge=8, description=(
        "width inside one expert's SwiGLU; null: model.mlp_hidden_size"))
    balancing: Literal["aux_loss", "bias", "none"] = Field("aux_loss", description=(
        "load balancing of experts: an auxiliary loss (softmax scores); a bias on the router's scores that follows the "
        "load, without a loss (sigmoid scores); none"))
    aux_loss_weight: float = Field(1e-2, ge=0, description="aux_loss: its weight")
    bias_rate: float = Field(1e-3, gt=0, description="bias: its change per step (saved in checkpoints)")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """Shape of the network."""

    layers: int = Field(ge=1, description="number of layers")
    hidden_size: int = Field(ge=8, description="width of the residual stream")
    pattern: Annotated[str, AfterValidator(_known_pattern)] = Field("H", description=(
        "layer kinds, repeated to fill all layers, by letter (HHHA) or by name (hola*3, attention): "
        + "; ".join(f"{kind.label} {kind.summary}" for kind in KINDS.values())))
    heads: int = Field(ge=1, description="heads of H, G, hqlt, ham and deltaproduct layers")
    key_dim: int = Field(ge=8, description="key and query width of one head")
    value_dim: int = Field(ge=8, description="value width of one head")
    conv_width: int = Field(4, ge=1, description="width of the short convolution, in tokens")
    rule: Literal["gdn", "delta", "none"] = Field("gdn", description=(
        "what the state of H and G layers does: gdn decays (Gated DeltaNet), delta never decays (DeltaNet); none: H "
        "layers have no state, the exact part alone, with score recency, random, betav or learned (or slots: 0)"))
    beta_range: Literal[1, 2] = Field(1, description=(
        "write strength: beta = beta_range x sigmoid; 2 allows negative eigenvalues"))
    delta_steps: int = Field(2, ge=1, description="deltaproduct layers: writes of the delta rule a token")
    state_delay: int = Field(0, ge=0, description=(
        "H and G layers: a token reads the state that is so many tokens old; 0: its own; without context ranks"))
    state_delay_mode: Literal["stream", "chunk"] = Field("stream", description=(
        "stream: the state of state_delay tokens ago; chunk (G layers): that before the token's chunk of state_delay "
        "tokens"))
    attention_heads: int = Field(16, ge=1, description="heads of A and W layers")
    attention_kv_heads: int | None = Field(None, ge=1, description=(
        "key and value heads of A and W layers, each for as many query heads (grouped queries); null: attention_heads"))
    attention_qk_norm: bool = Field(False, description=(
        "RMSNorm of every head's queries and keys in A and W layers, before their positions"))
    attention_window: int = Field(1024, ge=1, description="tokens that a token of W layers sees, itself included")
    rope_theta: float | None = Field(10000.0, gt=0, description="rotary base of A and W layers; null for no positions")
    mlp_hidden_size: int = Field(ge=8, description="width inside the SwiGLU MLP")
    vocab_size: int = Field(ge=2, description="rows of the embedding; at least the tokenizer's vocabulary")
    tie_embeddings: bool = Field(True, description="use the embedding as output projection")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of all RMSNorms outside the kernels")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the normal initialisation")
    cache: CacheConfig = Field(default_factory=CacheConfig, description="exact cache of H layers")
    hqlt: HqltConfig = Field(default_factory=HqltConfig, description="the two memories of hqlt layers")
    ham: HamConfig = Field(default_factory=HamConfig, description="the kept tokens of ham layers")
    moe: MoeConfig = Field(default_factory=MoeConfig, description="mixture of experts")
    backend: Literal["auto", "reference", "torch", "triton"] = Field(
        "auto", description=(
        "our kernels: those of H and G layers, of norms, of the MLP and of the loss; A and W layers take flash "
        "attention over documents by auto and triton, torch's attention document by document by torch"))
    layer_spec: Literal["auto", "local", "te"] = Field(
        "auto", description="linear layers: Megatron's own, or Transformer Engine's; auto takes te on a GPU")

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, first to last."""
        return expand(self.pattern, self.layers)

    @property
    def layer_states(self) -> set[str]:
        """Public names of the tensors that training changes without an optimizer (`LayerKind.states`)."""
        return {f"model.layers.{layer}.mixer.{name}" for layer, kind in enumerate(self.layer_kinds)
                for name in kind.states(self)}

    @property
    def expert_hidden_size(self) -> int:
        """Width inside one expert."""
        return self.moe.hidden_size or self.mlp_hidden_size


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSource:
    """One stream of a mixture."""

    path: str = Field(description="folder (or URL) written by tools/prepare_data.py")
    weight: float = Field(1.0, gt=0, description="share of samples, relative to the other streams")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PhaseStream:
    """One stream of a phase."""

    path: str = Field(description="folder (or URL) written by tools/prepare_data.py")
    tokens: float = Field(gt=0, description="tokens that the phase reads of it, such as 2e9; the last sample is whole")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataPhase:
    """A mixture that is read before data.train, until each of its streams has given its tokens."""

    streams: list[PhaseStream] = Field(min_length=1, description="what is read, evenly mixed")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Training and validation data."""

    train: str | list[DataSource] = Field(description="a folder written by tools/prepare_data.py, or a weighted list")
    phases: list[DataPhase] | None = Field(None, description=(
        "other mixtures before it, in order: [{streams: [{path: FOLDER, tokens: 2e9}, ...]}, ...]; null for none"))
    valid: str | dict[SetName, str] | None = Field(None, description=(
        "folder for validation, or several by name: {web: FOLDER, code: FOLDER}; null for none"))
    tokenizer: str = Field(description="'bytes', a tokenizer.json, GPT-2 files' folder, or a sentencepiece model")
    documents: Literal["separate", "joined"] = Field(
        "separate", description="separate: state, cache and loss are reset at document ends; joined: one sequence")
    cache: str | None = Field(None, description="local folder for shards of remote data")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RampStage:
    """One batch size of a ramp."""

    batch: int = Field(ge=1, description="samples a step, over all ranks")
    steps: int = Field(ge=1, description="steps of this size")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InitConfig:
    """What a new run starts from. A run that has a checkpoint of its own resumes from that one instead."""

    source: str | None = Field(None, description=(
        "run folder (its newest checkpoint), step_NNNNNNNN folder or exported Hugging Face folder whose weights the "
        "run starts from; null: weights drawn by train.seed (alias: from)"))
    optimizer: Literal["fresh", "keep"] = Field("fresh", description=(
        "fresh: moments of zero; keep: the moments and the number of updates of the checkpoint"))
    data: Literal["keep", "fresh"] = Field("keep", description=(
        "keep: every stream goes on where the earlier run left it, so that nothing is read twice before an epoch ends; "
        "fresh: from its first sample"))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Batches, optimizer, precision and memory of training."""

    sequence_length: int = Field(ge=1, description="tokens a sample")
    global_batch_size: int = Field(ge=1, description="samples a step, over all ranks")
    micro_batch_size: int = Field(1, ge=1, description="samples a forward pass on one rank")
    steps: int = Field(ge=1, description="optimizer steps of the whole run")
    learning_rate: float = Field(gt=0, description="peak learning rate (alias: lr)")
    min_learning_rate: float = Field(0.0, ge=0, description="learning rate at the end (alias: min_lr)")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    batch_ramp: list[RampStage] | None = Field(None, description=(
        "smaller batches at the start: [{batch: 64, steps: 1000}, ...], then global_batch_size; null for none"))
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field("cosine", description=(
        "shape after warm-up; cosine and linear reach min_learning_rate at the last step, wsd (warm-up, stable, decay) "
        "is constant until a cooldown to it"))
    cooldown_steps: int | None = Field(None, ge=1, description="wsd: steps of the cooldown, at the end")
    cooldown_shape: Literal["linear", "sqrt"] = Field("linear", description=(
        "wsd: share of the way down after a share x of the cooldown: x, or sqrt(x) (fast at first)"))
    weight_decay: float = Field(0.01, ge=0, description="decoupled; not on vectors (norms, decay, gates)")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description=(
        "adamw for all; muon: the layers' matrices by Muon with updates of AdamW's size, all else by AdamW"))
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum (Nesterov)")
    muon_steps: int = Field(5, ge=1, description="Muon's Newton-Schulz steps")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second moment")
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    clip_grad_norm: float = Field(1.0, ge=0, description="global gradient norm limit; 0 for none")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="weights and activations; the optimizer is fp32")
    recompute: Literal["none", "full"] = Field("none", description="activations saved, or recomputed layer by layer")
    cuda_graph: bool = Field(False, description=(
        "forward and backward pass of a micro-batch as one CUDA graph: for few tokens per rank, where kernel launches "
        "take longer than the kernels; without pipeline and context ranks, experts and fp8"))
    cuda_graph_documents: int | None = Field(None, ge=1, description=(
        "maximum of documents in a micro-batch of the graph; one with more runs without it; null: one for each 256 "
        "tokens, at least 4 a sample"))
    logits_budget_gb: float | None = Field(2.0, gt=0, description=(
        "GB (10^9 bytes) for logits on a rank: where they and the loss's copy of them take more, the loss is computed "
        "in chunks of tokens; null: never"))
    seed: int = Field(1234, ge=0, description="of weights and data order")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Fp8Config:
    """8-bit matrix products of every layer's linears (Transformer Engine). All else stays bf16 or float32: embedding,
    output projection and loss, norms, convolutions, state and exact cache, stored weights, gradients, optimizer."""

    recipe: Literal["delayed", "current", "blockwise"] | None = Field(None, description=(
        "scaling of a tensor before its cast: one scale from earlier steps (delayed), one from itself (current), one "
        "for each 128 values (blockwise); null: bf16. Gradients are e5m2, all else e4m3; blockwise e4m3 throughout"))
    first_layers_bf16: int = Field(0, ge=0, description="layers at the start that stay bf16; not with delayed")
    last_layers_bf16: int = Field(0, ge=0, description="layers at the end that stay bf16; not with delayed")
    amax_history: int = Field(1024, ge=1, description=(
        "delayed: micro-batches whose maximum sets the scale (saved in checkpoints)"))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """How the model and the batch are divided over ranks; the remaining ranks are data-parallel."""

    tensor: int = Field(1, ge=1, description="ranks that share every layer's heads and widths")
    sequence: bool = Field(False, description="also divide norms and residuals over the tensor ranks")
    pipeline: int = Field(1, ge=1, description="ranks that share the layers")
    virtual_pipeline: int = Field(1, ge=1, description="model chunks a pipeline rank (interleaved schedule)")
    context: int = Field(1, ge=1, description="ranks that share one sequence")
    expert: int = Field(1, ge=1, description=(
        "ranks that share a layer's experts, each with some of them whole; of tensor, context and data ranks"))
    distributed_optimizer: bool = Field(True, description="shard optimizer state over data-parallel ranks")
    zero_stage: Literal[1, 2, 3] = Field(1, description=(
        "engine deepspeed: what is sharded over data ranks: 1 optimizer state, 2 gradients as well; 3 is refused"))
    overlap: bool = Field(True, description="reduce gradients and gather parameters while computing")
    timeout_minutes: float = Field(30.0, gt=0, description="a collective that waits longer ends the run")
    hang_seconds: float | None = Field(900.0, gt=0, description=(
        "without progress for so long all ranks end with code 76, and the rank that hangs is named; null: never"))

    @property
    def model_ranks(self) -> int:
        """Ranks of one model copy."""
        return self.tensor * self.pipeline * self.context


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """Schedule and retention of checkpoints."""

    every: int = Field(1000, ge=1, description="steps between checkpoints (the last step always makes one)")
    keep: int = Field(2, ge=1, description="newest checkpoints to keep")
    keep_every: int | None = Field(None, ge=1, description=(
        "checkpoints at multiples of this step are never removed"))
    upload: str | None = Field(None, description=(
        "URL (s3://, gs://, ...) to which every checkpoint is copied while the run goes on; null for none"))
    write_seconds: float | None = Field(1800.0, gt=0, description=(
        "a checkpoint that is not complete after so long ends all ranks with code 76 (the log reports it after a "
        "minute); null: never"))
    background: bool = Field(True, description=(
        "write during training, from a copy in host memory; false saves that memory"))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuardConfig:
    """Bad steps: when a step is bad; bad steps are skipped, then the run is rewound, then stops with code 4."""

    window: int = Field(128, ge=8, description="good steps the median is taken over")
    warmup: int = Field(32, ge=8, description="good steps before spikes are detected (non-finite values always are)")
    loss_mads: float | None = Field(12.0, gt=0, description="deviations over the median that are a spike; null: none")
    grad_mads: float | None = Field(100.0, gt=0, description="the same for the gradient norm")
    max_skips: int = Field(3, ge=0, description="bad steps in a row that are skipped")
    max_rewinds: int = Field(2, ge=0, description=(
        "rewinds of one run to its newest healthy checkpoint, which continue after the bad samples"))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    """Console lines, metrics and sample texts."""

    every: int = Field(10, ge=1, description="steps between lines")
    tensorboard: bool = Field(True, description="write TensorBoard events to the run folder")
    wandb_project: str | None = Field(None, description="Weights & Biases project; null for none")
    sample_every: int | None = Field(None, ge=1, description="steps between sample texts; null for none")
    sample_prompt: str = Field("The ", description="prompt of a sample text")
    sample_tokens: int = Field(64, ge=1, description="tokens of a sample text")
    memory_health: bool = Field(True, description="log statistics of the exact cache at every validation")
    peak_tflops: float | None = Field(None, gt=0, description="peak of the device for MFU, if it is not a known one")
    straggler_ratio: float = Field(1.25, gt=1, description=(
        "a rank is reported as slow if its own work takes this many times its peers' median"))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ValidConfig:
    """Validation inside the run."""

    every: int = Field(1000, ge=1, description="steps between validations (also at the end)")
    samples: int = Field(1024, ge=1, description="samples of each validation set used at most")
    tasks: list[str] | None = Field(None, description=(
        "tasks of lm-evaluation-harness, run on the training ranks and logged: multiple choice, last words, "
        "perplexities; needs the extra eval; null for none"))
    tasks_every: int | None = Field(None, ge=1, description="steps between them; null for valid.every")
    tasks_data: str | None = Field(None, description=(
        "folder with the tasks' records (docs/evaluate.md); null for the Hugging Face hub"))
    tasks_limit: int | None = Field(None, ge=1, description="items of each task, the first ones; null for all")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}$", description="names the run folder")
    run_dir: str | None = Field(None, description="run folder; null for runs/NAME")
    engine: Literal["megatron", "deepspeed"] = Field("megatron", description=(
        "what reduces gradients and updates weights: Megatron-core, or DeepSpeed's ZeRO around the same model"))
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    init: InitConfig = Field(default_factory=InitConfig)
    fp8: Fp8Config = Field(default_factory=Fp8Config)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    valid: ValidConfig = Field(default_factory=ValidConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.train.sequence_length

    @property
    def min_shard_tokens(self) -> int:
        """Minimum of tokens per row on a context-parallel rank: a cache block or a window spans two ranks at most."""
        return max(kind.least_tokens(self.model) for kind in self.model.layer_kinds)

    def data_ranks(self, world_size: int) -> int:
        """Data-parallel size: the ranks left when each copy of the model has its own."""
        return world_size // self.parallel.model_ranks

    def samples_of(self, tokens: float) -> int:
        """Whole samples that hold so many tokens."""
        return -(-int(tokens) // self.train.sequence_length)

    def batch_size(self, step: int) -> int:
        """Samples of the step after `step` finished steps."""
        for stage in self.train.batch_ramp or ():
            if step < stage.steps:
                return stage.batch
            step -= stage.steps
        return self.train.global_batch_size

    def samples_before(self, step: int) -> int:
        """Samples of the first `step` steps."""
        samples = 0
        for stage in self.train.batch_ramp or ():
            taken = min(step, stage.steps)
            samples, step = samples + taken * stage.batch, step - taken
        return samples + step * self.train.global_batch_size

    def micro_batches(self, world_size: int, step: int | None = None) -> int:
        """Forward passes a rank makes for the step after `step` finished steps; None: one after a batch ramp."""
        batch = self.train.global_batch_size if step is None else self.batch_size(step)
        return batch // (self.train.micro_batch_size * self.data_ranks(world_size))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML or JSON can hold them."""
        return asdict(self)
