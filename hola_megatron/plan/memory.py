"""The peak of a rank, by part, at the moment of a step when it is highest.

    loss        all layers' saved tensors, and the logits: twice where all are made at once (the loss keeps a copy until
                the first is freed), or one chunk of them and the gradients, accumulated over chunks
    backward    all layers' saved tensors, and the working memory of one layer's backward pass
    update      nothing saved; the optimizer's temporaries (Transformer Engine's Adam has none)

With recompute=full a layer keeps its input only, and one layer at a time all of its tensors. GB are 10^9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from hola_megatron.engine.zero_bucket import bucket_elements
from hola_megatron.layers.costs import FLOAT32, Share, Term
from hola_megatron.layers.registry import distinct
from hola_megatron.model.logits import chunk_rows, logits_copies
from hola_megatron.plan.activations import layer_workspace, saved_by_layer
from hola_megatron.plan.parameters import rank_parameters, rank_products, stage_layers
from hola_megatron.recipe.schema import Recipe

GB = 1e9
# cuBLAS on Hopper takes 32 MiB a handle: torch has one for the main and one for the autograd thread, TE its own
CUBLAS_BYTES = 3 * 32 * 2**20
# choices, not measured: what no tensor counter shows. CUDA context, kernel modules and NCCL's buffers; and the share
# of the moving part (activations, logits, workspace) that torch's allocator cannot hand out again
LIBRARIES_BYTES = 1.5e9
FRAGMENTED_SHARE = 0.05
PARTS = ("weights", "gradients", "optimizer", "activations", "kernels", "workspace", "logits", "messages", "libraries",
         "reserve")


@dataclass(frozen=True)
class StageMemory:
    """One rank of a pipeline stage. parts: bytes at `moment`, the peak of a step; "reserve" is not for tensors."""

    stage: int
    moment: str
    parts: dict[str, float]

    @property
    def allocated(self) -> float:
        """Bytes torch.cuda.max_memory_allocated would show."""
        return sum(size for name, size in self.parts.items() if name != "reserve")

    @property
    def total(self) -> float:
        """Bytes of the device that are taken."""
        return sum(self.parts.values())


def worst_stage(recipe: Recipe, world: int) -> StageMemory:
    """The pipeline stage that needs most, on `world` ranks (a number the layout divides)."""
    return max((stage_memory(recipe, world, stage) for stage in range(recipe.parallel.pipeline)),
               key=lambda memory: memory.total)


def stage_memory(recipe: Recipe, world: int, stage: int) -> StageMemory:
    """A rank of this stage, at its highest moment."""
    moments = {name: _reserved({**_standing(recipe, world, stage), **parts})
               for name, parts in _moments(recipe, world, stage).items()}
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    return StageMemory(stage, name, {part: moments[name].get(part, 0.0) for part in PARTS})


def live_micro_batches(recipe: Recipe, world: int, stage: int) -> float:
    """Micro-batches whose saved tensors are alive at once on a stage, of all its layers (Megatron's 1F1B schedules)."""
    stages, chunks = recipe.parallel.pipeline, recipe.parallel.virtual_pipeline
    count = recipe.micro_batches(world)
    if chunks == 1:
        return min(count, stages - stage)
    ahead = 2 * (stages - stage - 1) + (chunks - 1) * stages
    return min(count * chunks, ahead + 1) / chunks


def _standing(recipe: Recipe, world: int, stage: int) -> dict[str, float]:
    """What is there all the time."""
    if recipe.engine == "deepspeed":
        return _standing_of_zero(recipe, world, stage)
    counts, number = rank_parameters(recipe, stage), Share(recipe).number
    master = 0 if recipe.train.precision == "fp32" else FLOAT32
    experts = (master + 2 * FLOAT32) * counts.experts
    optimizer = master * counts.compute_dtype + 2 * FLOAT32 * counts.total - experts
    if recipe.train.optimizer == "muon":  # one moment of a matrix
        optimizer -= FLOAT32 * rank_products(recipe, stage)
    # each quantized weight is stored in both orientations, for the forward and the backward product, from step to step
    quantized = 2 * rank_products(recipe, stage) if recipe.fp8.recipe else 0
    return {"weights": counts.compute_dtype * number + counts.float32 * FLOAT32 + quantized,
            "gradients": counts.total * FLOAT32,
            "optimizer": optimizer / _optimizer_ranks(recipe, world) + experts / _expert_ranks(recipe, world),
            "libraries": CUBLAS_BYTES}


def _standing_of_zero(recipe: Recipe, world: int, stage: int) -> dict[str, float]:
    """The same for DeepSpeed's ZeRO: float32 weights and moments of all parameters, cut over data and context ranks.

    At the update gradients are float32: of all parameters and once more of the rank's part (stage 1), or of that part
    alone, beside two buckets that are reduced during the backward pass (stage 2).
    """
    counts, ranks = rank_parameters(recipe, stage), recipe.data_ranks(world) * recipe.parallel.context
    part, whole = counts.total / ranks * FLOAT32, counts.total * FLOAT32
    buckets = 2 * bucket_elements(counts.total) * FLOAT32
    return {"weights": counts.compute_dtype * Share(recipe).number + counts.float32 * FLOAT32,
            "gradients": part + (whole if recipe.parallel.zero_stage == 1 else buckets),
            "optimizer": 3 * part, "libraries": CUBLAS_BYTES}


def _optimizer_ranks(recipe: Recipe, world: int) -> int:
    return recipe.data_ranks(world) * recipe.parallel.context if recipe.parallel.distributed_optimizer else 1


def _expert_ranks(recipe: Recipe, world: int) -> int:
    """Ranks that the optimizer state of one rank's experts is cut over: those with the same experts."""
    parallel = recipe.parallel
    return world // (parallel.pipeline * parallel.expert) if parallel.distributed_optimizer else 1


def _moments(recipe: Recipe, world: int, stage: int) -> dict[str, dict[str, float]]:
    share, kinds = Share(recipe), stage_layers(recipe, stage)
    stream = share.norm_tokens * recipe.model.hidden_size * share.number
    messages = _messages(share, stream)
    live = live_micro_batches(recipe, world, stage)
    saved = {kind: _by_part(saved_by_layer(share, kind)) for kind in distinct(kinds)}
    if recipe.train.recompute == "full":
        saved_all = {"activations": live * len(kinds) * stream}
        # one layer at a time is recomputed; its input is among the saved tensors
        alive = [_sum(saved_all, saved[kind], {"activations": -stream}) for kind in saved]
    else:
        saved_all = _sum(*({part: live * size for part, size in saved[kind].items()} for kind in kinds))
        alive = [saved_all for _ in saved]
    backward = max((_sum(layers, {"workspace": layer_workspace(share, kind)}, messages)
                    for kind, layers in zip(saved, alive, strict=True)), key=lambda parts: sum(parts.values()))
    moments = {"backward": backward}
    if stage == recipe.parallel.pipeline - 1:
        moments["loss"] = _sum(saved_all, _loss(share, stream), messages)
    if recipe.model.layer_spec == "local" and recipe.engine == "megatron":  # GroupStepAdam's denominators
        counts = rank_parameters(recipe, stage)
        owned = (counts.total - counts.experts) / _optimizer_ranks(recipe, world) \
            + counts.experts / _expert_ranks(recipe, world)
        moments["update"] = {"workspace": FLOAT32 * owned}
    return moments


def _loss(share: Share, stream: float) -> dict[str, float]:
    """Output projection and cross-entropy, the larger peak of their forward and backward passes."""
    recipe, e = share.recipe, share.number
    columns = recipe.model.vocab_size // recipe.parallel.tensor
    logits = share.tokens * columns * e
    small = share.tokens * 40  # ids, labels, mask, loss and its statistics
    copies = logits_copies(e, recipe.model.layer_spec != "local")
    weight_gradient = columns * recipe.model.hidden_size * e
    input_gradient = share.tokens * recipe.model.hidden_size * e
    rows = chunk_rows(share.tokens, columns, e, copies, recipe.train.logits_budget_gb)
    if rows is not None:  # the weight's gradient is summed in float32 if there are several chunks
        summed = weight_gradient // e * FLOAT32 if rows < share.tokens else 0
        at_once = min(rows, share.tokens) * columns * e
        return {"activations": 2 * stream, "logits": at_once + input_gradient + weight_gradient + summed + small}
    forward = copies * logits
    backward = max((copies - 1) * logits, logits) + input_gradient + weight_gradient
    return {"activations": 2 * stream, "logits": max(forward, backward) + small}


def _messages(share: Share, stream: float) -> dict[str, float]:
    """Buffers of what ranks send each other that live at the peak."""
    recipe, model = share.recipe, share.recipe.model
    pipeline = 2 * stream if recipe.parallel.pipeline > 1 else 0.0  # an input on its way and a gradient
    gathered = share.tokens * model.hidden_size * share.number if recipe.parallel.sequence else 0.0
    context = 0.0
    if recipe.parallel.context > 1:
        context = max(kind.messages(share) for kind in distinct(model.layer_kinds))
    return {"messages": pipeline + gathered + context}


def _by_part(terms: list[Term]) -> dict[str, float]:
    sizes: dict[str, float] = {}
    for term in terms:
        part = "messages" if term.part == "context" else term.part
        sizes[part] = sizes.get(part, 0.0) + term.bytes
    return sizes


def _sum(*several: dict[str, float]) -> dict[str, float]:
    names = {name for parts in several for name in parts}
    return {name: sum(parts.get(name, 0.0) for parts in several) for name in names}


def _reserved(parts: dict[str, float]) -> dict[str, float]:
    moving = sum(parts.get(name, 0.0) for name in ("activations", "kernels", "workspace", "logits", "messages"))
    return {**parts, "reserve": LIBRARIES_BYTES + FRAGMENTED_SHARE * moving}
