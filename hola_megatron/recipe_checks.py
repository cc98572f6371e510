"""What single fields of a recipe cannot show: sizes that must divide, and what does not go together.

Every check yields its problems, one line each: where, what, what is allowed or what to do.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hola_megatron.config import Recipe

# what our Triton kernels take: widths of a head's keys and values, tokens of a convolution
KERNEL_WIDTHS, KERNEL_TAPS = (64, 128, 256), 4


def check_recipe(recipe: Recipe, world_size: int | None = None) -> list[str]:
    """All problems of a recipe whose fields are each right. With world_size also what the ranks imply."""
    problems = [*_check_sizes(recipe), *_check_context(recipe), *_check_fp8(recipe), *_check_experts(recipe),
                *_check_engine(recipe), *_check_cuda_graph(recipe), *_check_training(recipe)]
    return problems if world_size is None else [*problems, *_check_world(recipe, world_size)]


def missing_packages(recipe: Recipe) -> list[str]:
    """Packages that this recipe needs and this Python lacks."""
    needed = [("engine: deepspeed", "deepspeed", recipe.engine == "deepspeed", "engine=megatron"),
              ("log.wandb_project:", "wandb", recipe.log.wandb_project is not None, "log.wandb_project=null")]
    return [f"{what} needs the package {package}, which is not installed; install it (pip install -e '.[{package}]'), "
            f"or set {otherwise}"
            for what, package, asked, otherwise in needed if asked and importlib.util.find_spec(package) is None]


def _must_divide(path: str, value: int, by: int, reason: str) -> Iterator[str]:
    if value % by:
        yield f"{path}: {value} is not a multiple of {by} ({reason})"


def _at_most(path: str, value: int, limit_path: str, limit: int) -> Iterator[str]:
    if value > limit:
        yield f"{path}: {value} is more than {limit_path} = {limit}"


def _only(feature: str, fields: list[tuple[str, Any, Any]], otherwise: str | None = None) -> Iterator[str]:
    """What (dotted path, value, the one value it may have) of the fields does not go with the feature.

    otherwise: what can be set instead, so that the feature is not used.
    """
    for path, value, allowed in fields:
        if value != allowed:
            given, wanted = (json.dumps(x).strip('"') for x in (value, allowed))
            yield (f"{path}: {given} is not possible with {feature}; set it to {wanted}"
                   + (f", or {otherwise}" if otherwise else ""))


def _check_sizes(recipe: Recipe) -> Iterator[str]:
    model, parallel = recipe.model, recipe.parallel
    kinds, tp = set(model.layer_kinds), parallel.tensor
    if kinds & set("HG"):
        yield from _must_divide("model.heads", model.heads, tp, f"parallel.tensor = {tp} cuts heads")
    if "A" in kinds:
        yield from _must_divide("model.attention_heads", model.attention_heads, tp,
                                f"parallel.tensor = {tp} cuts heads")
        yield from _must_divide("model.hidden_size", model.hidden_size, 2 * model.attention_heads,
                                "an attention head's width must be even")
    yield from _must_divide("model.vocab_size", model.vocab_size, tp, f"parallel.tensor = {tp} cuts the vocabulary")
    yield from _must_divide("model.mlp_hidden_size", model.mlp_hidden_size, tp, f"parallel.tensor = {tp} cuts the MLP")
    chunks = parallel.pipeline * parallel.virtual_pipeline
    yield from _must_divide("model.layers", model.layers, chunks, f"pipeline x virtual_pipeline = {chunks} chunks")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield "parallel.virtual_pipeline: needs parallel.pipeline of at least 2; set it to 1"
    if parallel.sequence:
        if tp == 1:
            yield "parallel.sequence: true needs parallel.tensor of at least 2; set it to false"
        yield from _must_divide("train.sequence_length", recipe.train.sequence_length, tp,
                                "parallel.sequence cuts the sequence")


def _check_context(recipe: Recipe) -> Iterator[str]:
    train, parallel = recipe.train, recipe.parallel
    if parallel.context == 1:
        return
    packed = recipe.data.documents == "separate"
    row = train.sequence_length * (train.micro_batch_size if packed else 1)
    shown = "sequence_length x micro_batch_size" if packed else "sequence_length"
    pieces = parallel.context * (parallel.tensor if parallel.sequence else 1)
    part, least = row // parallel.context, recipe.least_part
    if row % pieces:
        by = "parallel.context x parallel.tensor" if parallel.sequence else "parallel.context"
        yield (f"parallel.context: rows of {row} tokens ({shown}) are not a multiple of {by} = {pieces}; change "
               "train.sequence_length or parallel.context")
    elif part < least:
        yield (f"parallel.context: {parallel.context} ranks get {part} tokens each of a row of {row} ({shown}), and "
               f"need {least} (model.cache.block - 1 or model.conv_width - 1); take fewer ranks or longer rows")


def _check_fp8(recipe: Recipe) -> Iterator[str]:
    """What 8-bit products need of the recipe, and the layers that stay bf16."""
    model, fp8 = recipe.model, recipe.fp8
    if fp8.recipe is None:
        return
    if recipe.train.precision != "bf16":
        yield f"fp8.recipe: {fp8.recipe} needs train.precision of bf16, not {recipe.train.precision}"
    if model.layer_spec == "local":
        yield f"fp8.recipe: {fp8.recipe} needs Transformer Engine's layers; set model.layer_spec to te or auto"
    if model.moe.experts is not None:
        yield (f"fp8.recipe: {fp8.recipe} is not possible with experts (model.moe.experts), whose tokens come in any "
               "number; set it to null")
    most = model.layers // recipe.parallel.pipeline
    for name, count in (("first_layers_bf16", fp8.first_layers_bf16), ("last_layers_bf16", fp8.last_layers_bf16)):
        if count and fp8.recipe == "delayed":
            yield (f"fp8.{name}: {count} layers in bf16 are not possible with the delayed recipe; set it to 0, or "
                   "fp8.recipe to current or blockwise")
        elif count > most:
            yield f"fp8.{name}: {count} is more than the {most} layers of a pipeline stage"
    yield from _check_fp8_sizes(recipe)


def _check_fp8_sizes(recipe: Recipe) -> Iterator[str]:
    """8-bit products take sizes that are multiples of 16 on every rank (the fused input projection is padded)."""
    model, parallel = recipe.model, recipe.parallel
    kinds, tp = set(model.layer_kinds), parallel.tensor
    pieces = parallel.context * (tp if parallel.sequence else 1)
    tokens = recipe.train.micro_batch_size * recipe.train.sequence_length
    over_tensor = f" over parallel.tensor = {tp}"
    widths = [("model.hidden_size", model.hidden_size, 1, ""),
              ("model.mlp_hidden_size", model.mlp_hidden_size, tp, over_tensor),
              ("train.micro_batch_size x train.sequence_length", tokens, pieces, f" over {pieces} ranks")]
    if kinds & set("HG"):
        widths.append(("model.heads x model.value_dim", model.heads * model.value_dim, tp, over_tensor))
    if "A" in kinds:
        widths.append(("model.hidden_size", model.hidden_size, tp, over_tensor))
    for path, size, ranks, how in widths:
        if size % (16 * ranks):
            yield (f"{path}: {size}{how if ranks > 1 else ''} is not a multiple of 16 on every rank, as fp8.recipe = "
                   f"{recipe.fp8.recipe} needs")


def _check_experts(recipe: Recipe) -> Iterator[str]:
    moe, parallel = recipe.model.moe, recipe.parallel
    if moe.experts is None:
        if parallel.expert > 1:
            yield (f"parallel.expert: {parallel.expert} ranks share experts, and model.moe.experts is null; set it to "
                   "1, or give experts")
        if moe.hidden_size is not None:
            yield (f"model.moe.hidden_size: {moe.hidden_size} is given, and model.moe.experts is null; leave it out, "
                   "or give experts")
        return
    yield from _at_most("model.moe.top_k", moe.top_k, "model.moe.experts", moe.experts)
    yield from _must_divide("model.moe.experts", moe.experts, parallel.expert,
                            f"parallel.expert = {parallel.expert} cuts experts")
    if parallel.tensor > 1 and not parallel.sequence:
        yield f"parallel.sequence: false, and experts on parallel.tensor = {parallel.tensor} ranks need true"
    yield from _only("model.moe.experts", [("fp8.recipe", recipe.fp8.recipe, None),
                                           ("train.optimizer", recipe.train.optimizer, "adamw")])


def _check_engine(recipe: Recipe) -> Iterator[str]:
    """What DeepSpeed's ZeRO cannot do here, and what is nothing without it."""
    parallel = recipe.parallel
    if recipe.engine == "megatron":
        if parallel.zero_stage != 1:
            yield (f"parallel.zero_stage: {parallel.zero_stage} belongs to engine = deepspeed; set it to 1, or engine "
                   "to deepspeed")
        return
    if parallel.zero_stage == 3:
        yield ("parallel.zero_stage: 3 is not possible: the loss uses the output projection outside its own module, "
               "and checkpoints do not know stage 3's pieces of weights; set it to 1 or 2")
    yield from _only("engine = deepspeed", [
        ("parallel.pipeline", parallel.pipeline, 1), ("parallel.virtual_pipeline", parallel.virtual_pipeline, 1),
        ("parallel.expert", parallel.expert, 1),
        ("parallel.distributed_optimizer", parallel.distributed_optimizer, True),
        ("model.moe.experts", recipe.model.moe.experts, None), ("train.optimizer", recipe.train.optimizer, "adamw"),
        ("fp8.recipe", recipe.fp8.recipe, None)], otherwise="engine to megatron")


def _check_cuda_graph(recipe: Recipe) -> Iterator[str]:
    """What reads the device on the host, or depends on numbers of the very step, cannot be part of a graph."""
    model, parallel, room = recipe.model, recipe.parallel, recipe.train.cuda_graph_documents
    if room is not None and not (recipe.train.cuda_graph and recipe.data.documents == "separate"):
        yield (f"train.cuda_graph_documents: {room} belongs to train.cuda_graph = true and data.documents = separate; "
               "leave it out")
    if not recipe.train.cuda_graph:
        return
    if room is not None and room < recipe.train.micro_batch_size:
        yield (f"train.cuda_graph_documents: {room} is less than train.micro_batch_size = "
               f"{recipe.train.micro_batch_size}, and a sample is one document or more; make it larger")
    yield from _only("train.cuda_graph", [
        ("engine", recipe.engine, "megatron"), ("parallel.pipeline", parallel.pipeline, 1),
        ("parallel.context", parallel.context, 1), ("model.moe.experts", model.moe.experts, None),
        ("fp8.recipe", recipe.fp8.recipe, None)], otherwise="train.cuda_graph to false")
    kinds = set(model.layer_kinds)
    if kinds & set("HG"):
        if model.backend not in ("auto", "triton"):
            yield (f"model.backend: {model.backend} is not possible with train.cuda_graph; set it to auto or triton, "
                   "or train.cuda_graph to false")
        for name in ("key_dim", "value_dim"):
            if getattr(model, name) not in KERNEL_WIDTHS:
                yield (f"model.{name}: {getattr(model, name)} is not possible with train.cuda_graph, whose kernels "
                       f"take {', '.join(map(str, KERNEL_WIDTHS))}; set it to one, or train.cuda_graph to false")
        if model.conv_width > KERNEL_TAPS:
            yield (f"model.conv_width: {model.conv_width} is not possible with train.cuda_graph, whose kernels take "
                   f"{KERNEL_TAPS} at most; make it smaller, or set train.cuda_graph to false")
    if "H" in kinds and model.cache.score in ("recency", "random"):
        yield (f"model.cache.score: {model.cache.score} is not possible with train.cuda_graph; set it to betae, e or "
               "betav, or train.cuda_graph to false")
    if recipe.data.documents == "separate" and "A" in kinds:
        yield ("train.cuda_graph: true is not possible where softmax attention keeps documents separate; set it to "
               "false, or data.documents to joined")


def _check_training(recipe: Recipe) -> Iterator[str]:
    train, guard = recipe.train, recipe.guard
    if train.optimizer == "muon" and recipe.parallel.distributed_optimizer and recipe.engine == "megatron":
        yield ("train.optimizer: muon needs whole matrices on every data rank; set "
               "parallel.distributed_optimizer=false")
    yield from _at_most("guard.warmup", guard.warmup, "guard.window", guard.window)
    for problem in _at_most("train.warmup_steps", train.warmup_steps, "train.steps", train.steps):
        yield f"{problem}; set it to 0 for a run so short"
    if train.min_learning_rate > train.learning_rate:
        yield (f"train.min_learning_rate: {train.min_learning_rate} is above train.learning_rate = "
               f"{train.learning_rate}")


def _check_world(recipe: Recipe, world_size: int) -> Iterator[str]:
    """The first thing that the number of processes does not fit: later ones follow from it."""
    train, parallel = recipe.train, recipe.parallel
    ranks, stages = parallel.model_ranks, parallel.pipeline
    if world_size % ranks:
        yield (f"parallel: tensor x pipeline x context = {ranks} does not divide the {world_size} processes started; "
               f"start a multiple of {ranks}")
        return
    share, sharing = train.micro_batch_size * recipe.data_ranks(world_size), world_size // stages
    count = recipe.micro_batches(world_size)
    if train.global_batch_size % share:
        yield (f"train.global_batch_size: {train.global_batch_size} is not a multiple of micro_batch_size x "
               f"data-parallel ranks = {share}")
    elif sharing % parallel.expert:
        yield f"parallel.expert: {parallel.expert} does not divide the {sharing} ranks of a pipeline stage"
    elif parallel.virtual_pipeline > 1 and count % stages:
        yield (f"train.micro_batch_size: {count} micro-batches a step is not a multiple of parallel.pipeline = "
               f"{stages}, which the interleaved schedule needs")
