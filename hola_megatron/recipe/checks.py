"""Checks across fields of a recipe: divisibility of sizes, and incompatible options.

Every check yields its problems, one line each: where, what, what is allowed or what to do.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hola_megatron.layers.registry import distinct, unused_fields
from hola_megatron.layers.spec import LayerKind
from hola_megatron.paths import path_problem
from hola_megatron.recipe.schema import CacheConfig, ModelConfig, Recipe


def check_recipe(recipe: Recipe, world_size: int | None = None) -> list[str]:
    """All problems of a recipe with valid fields. world_size: number of ranks; None: unknown."""
    problems = [*_check_paths(recipe), *_check_sizes(recipe), *_check_context(recipe), *_check_fp8(recipe),
                *_check_experts(recipe), *_check_engine(recipe), *_check_cuda_graph(recipe), *_check_training(recipe),
                *_check_init(recipe), *_check_upload(recipe), *_check_phases(recipe)]
    return problems if world_size is None else [*problems, *check_world(recipe, world_size)]


def missing_packages(recipe: Recipe) -> list[str]:
    """Problems of packages that the recipe needs and that are not installed."""
    needed = [("engine: deepspeed", "deepspeed", "deepspeed", recipe.engine == "deepspeed", "engine=megatron"),
              ("log.wandb_project:", "wandb", "wandb", recipe.log.wandb_project is not None, "log.wandb_project=null"),
              ("valid.tasks:", "lm_eval", "eval", bool(recipe.valid.tasks), "valid.tasks=null")]
    return [f"{what} needs the package {package}, which is not installed; install it (pip install -e '.[{extra}]'), "
            f"or set {otherwise}" for what, package, extra, is_used, otherwise in needed
            if is_used and importlib.util.find_spec(package) is None]


def _check_paths(recipe: Recipe) -> Iterator[str]:
    """Local paths that are URLs, and names that a shell should have replaced. data.train and data.valid may be URLs."""
    for name, value, use in (("run_dir", recipe.run_dir, "is written to"),
                             ("data.cache", recipe.data.cache, "is written to"),
                             ("init.from", recipe.init.source, "is read"),
                             ("valid.tasks_data", recipe.valid.tasks_data, "is read"),
                             ("data.tokenizer", recipe.data.tokenizer, "is read")):
        if value is not None and (problem := path_problem(name, value, use=use)):
            yield problem


def _must_divide(path: str, value: int, by: int, reason: str) -> Iterator[str]:
    if value % by:
        yield f"{path}: {value} is not a multiple of {by} ({reason})"


def _of_kinds[T](recipe: Recipe, needs: Callable[[LayerKind], Iterable[T]]) -> Iterator[T]:
    """Problems reported by the recipe's layer kinds, without duplicates."""
    yield from dict.fromkeys(answer for kind in distinct(recipe.model.layer_kinds) for answer in needs(kind))


def _at_most(path: str, value: int, limit_path: str, limit: int) -> Iterator[str]:
    if value > limit:
        yield f"{path}: {value} is more than {limit_path} = {limit}"


def _only(feature: str, fields: list[tuple[str, Any, Any]], otherwise: str | None = None) -> Iterator[str]:
    """Problems of fields (dotted path, value, the one allowed value) that are incompatible with the feature.

    otherwise: what can be set instead, so that the feature is not used.
    """
    for path, value, allowed in fields:
        if value != allowed:
            given, wanted = (json.dumps(x).strip('"') for x in (value, allowed))
            yield (f"{path}: {given} is not possible with {feature}; set it to {wanted}"
                   + (f", or {otherwise}" if otherwise else ""))


def _check_sizes(recipe: Recipe) -> Iterator[str]:
    model, parallel = recipe.model, recipe.parallel
    tp = parallel.tensor
    yield from _of_kinds(recipe, lambda kind: kind.check_sizes(recipe))
    yield from _must_divide("model.vocab_size", model.vocab_size, tp, f"parallel.tensor = {tp} shards the vocabulary")
    yield from _must_divide("model.mlp_hidden_size", model.mlp_hidden_size, tp,
                            f"parallel.tensor = {tp} shards the MLP")
    chunks = parallel.pipeline * parallel.virtual_pipeline
    yield from _must_divide("model.layers", model.layers, chunks, f"pipeline x virtual_pipeline = {chunks} chunks")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield "parallel.virtual_pipeline: needs parallel.pipeline of at least 2; set it to 1"
    if parallel.sequence:
        if tp == 1:
            yield "parallel.sequence: true needs parallel.tensor of at least 2; set it to false"
        yield from _must_divide("train.sequence_length", recipe.train.sequence_length, tp,
                                "parallel.sequence shards the sequence")


def check_without_effect(recipe: Recipe) -> Iterator[str]:
    """Problems of fields that belong to another one's value, and have a value of their own."""
    for name, (value, default, needed) in without_effect(recipe).items():
        if value != default:
            yield f"{name}: {value} has no effect without {needed}; leave it out (its default is {default})"


def without_effect(recipe: Recipe) -> dict[str, tuple[Any, Any, str]]:
    """{dotted name: (value, default, what it would need)} of fields that belong to another one's value."""
    model, cache, unused = recipe.model, recipe.model.cache, unused_fields(recipe.model.layer_kinds)
    has_state, a_state = model.rule != "none", "model.rule = gdn or delta"
    rows = [("", "delta_steps", "delta_steps" not in unused, "a deltaproduct layer in model.pattern"),
            ("", "beta_range", has_state, a_state),
            ("", "state_delay_mode", model.state_delay > 0, "model.state_delay of 1 or more")]
    if "cache" not in unused:
        rows += [("cache.", "gate_init", cache.merge == "add" and has_state,
                  "model.cache.merge = add" if has_state else a_state),
                 ("cache.", "router_width", cache.score == "learned", "model.cache.score = learned")]
    sections = {"": (model, ModelConfig), "cache.": (cache, CacheConfig)}
    return {f"model.{part}{name}": (getattr(sections[part][0], name),
                                    sections[part][1].__pydantic_fields__[name].default, needed)
            for part, name, is_used, needed in rows if not is_used}


def _check_context(recipe: Recipe) -> Iterator[str]:
    train, parallel = recipe.train, recipe.parallel
    if parallel.context == 1:
        return
    packed = recipe.data.documents == "separate"
    row = train.sequence_length * (train.micro_batch_size if packed else 1)
    shown = "sequence_length x micro_batch_size" if packed else "sequence_length"
    shards = parallel.context * (parallel.tensor if parallel.sequence else 1)
    part, least = row // parallel.context, recipe.min_shard_tokens
    if row % shards:
        by = "parallel.context x parallel.tensor" if parallel.sequence else "parallel.context"
        yield (f"parallel.context: rows of {row} tokens ({shown}) are not a multiple of {by} = {shards}; change "
               "train.sequence_length or parallel.context")
    elif part < least:
        yield (f"parallel.context: {parallel.context} ranks get {part} tokens each of a row of {row} ({shown}), and "
               f"need {least} (model.cache.block - 1, model.attention_window - 1 or model.conv_width - 1); take fewer "
               "ranks or longer rows")


def _check_fp8(recipe: Recipe) -> Iterator[str]:
    """Problems of fp8, and of the layers that stay bf16."""
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
    """fp8 needs multiples of 16 on every rank (the fused input projection is padded)."""
    model, parallel = recipe.model, recipe.parallel
    tp = parallel.tensor
    shards = parallel.context * (tp if parallel.sequence else 1)
    tokens = recipe.train.micro_batch_size * recipe.train.sequence_length
    over_tensor = f" over parallel.tensor = {tp}"
    widths = [("model.hidden_size", model.hidden_size, 1, ""),
              ("model.mlp_hidden_size", model.mlp_hidden_size, tp, over_tensor),
              ("train.micro_batch_size x train.sequence_length", tokens, shards, f" over {shards} ranks")]
    widths += [(path, size, tp, over_tensor) for path, size in
               _of_kinds(recipe, lambda kind: kind.fp8_widths(model))]
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
                            f"parallel.expert = {parallel.expert} shards experts")
    if parallel.tensor > 1 and not parallel.sequence:
        yield f"parallel.sequence: false, and experts on parallel.tensor = {parallel.tensor} ranks need true"
    yield from _only("model.moe.experts", [("fp8.recipe", recipe.fp8.recipe, None),
                                           ("train.optimizer", recipe.train.optimizer, "adamw")])


def _check_engine(recipe: Recipe) -> Iterator[str]:
    """Options that the DeepSpeed engine does not support, and those that need it."""
    parallel = recipe.parallel
    if recipe.engine == "megatron":
        if parallel.zero_stage != 1:
            yield (f"parallel.zero_stage: {parallel.zero_stage} belongs to engine = deepspeed; set it to 1, or engine "
                   "to deepspeed")
        return
    if parallel.zero_stage == 3:
        yield ("parallel.zero_stage: 3 is not possible: the loss uses the output projection outside its own module, "
               "and checkpoints do not support stage 3's sharded weights; set it to 1 or 2")
    yield from _only("engine = deepspeed", [
        ("parallel.pipeline", parallel.pipeline, 1), ("parallel.virtual_pipeline", parallel.virtual_pipeline, 1),
        ("parallel.expert", parallel.expert, 1),
        ("parallel.distributed_optimizer", parallel.distributed_optimizer, True),
        ("model.moe.experts", recipe.model.moe.experts, None), ("train.optimizer", recipe.train.optimizer, "adamw"),
        ("fp8.recipe", recipe.fp8.recipe, None)], otherwise="engine to megatron")


def _check_cuda_graph(recipe: Recipe) -> Iterator[str]:
    """Options incompatible with a CUDA graph: those that read the device on the host or depend on a step's values."""
    model, parallel, most = recipe.model, recipe.parallel, recipe.train.cuda_graph_documents
    if most is not None and not (recipe.train.cuda_graph and recipe.data.documents == "separate"):
        yield (f"train.cuda_graph_documents: {most} belongs to train.cuda_graph = true and data.documents = separate; "
               "leave it out")
    if not recipe.train.cuda_graph:
        return
    if most is not None and most < recipe.train.micro_batch_size:
        yield (f"train.cuda_graph_documents: {most} is less than train.micro_batch_size = "
               f"{recipe.train.micro_batch_size}, and a sample is one document or more; make it larger")
    yield from _only("train.cuda_graph", [
        ("engine", recipe.engine, "megatron"), ("parallel.pipeline", parallel.pipeline, 1),
        ("parallel.context", parallel.context, 1), ("model.moe.experts", model.moe.experts, None),
        ("fp8.recipe", recipe.fp8.recipe, None)], otherwise="train.cuda_graph to false")
    yield from _of_kinds(recipe, lambda kind: kind.check_cuda_graph(recipe))


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
    yield from _check_cooldown(recipe)
    ramp = sum(stage.steps for stage in train.batch_ramp or ())
    if train.batch_ramp == []:
        yield "train.batch_ramp: [] has no stage; give [{batch: 64, steps: 1000}, ...] or null"
    if ramp > train.steps:
        yield f"train.batch_ramp: its stages have {ramp:,} steps, train.steps is {train.steps:,}; shorten the ramp"


def _check_cooldown(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    if train.schedule != "wsd":
        for name, value, default in (("cooldown_steps", train.cooldown_steps, None),
                                     ("cooldown_shape", train.cooldown_shape, "linear")):
            if value != default:
                yield (f"train.{name}: {value} belongs to train.schedule = wsd, and that is {train.schedule}; leave it "
                       "out, or set train.schedule to wsd")
    elif train.cooldown_steps is None:
        yield "train.cooldown_steps: null, and train.schedule is wsd; give the steps of the cooldown at the end"
    elif train.warmup_steps + train.cooldown_steps > train.steps:
        yield (f"train.cooldown_steps: {train.cooldown_steps} and train.warmup_steps = {train.warmup_steps} are more "
               f"than train.steps = {train.steps}; shorten one")


def _check_upload(recipe: Recipe) -> Iterator[str]:
    url = recipe.checkpoint.upload
    if url is not None and ("://" not in url or url.startswith("file:")):
        yield (f"checkpoint.upload: {url} is no URL; give one of a folder of this run's own, such as "
               f"s3://bucket/runs/{recipe.name}, or null (a local folder is run_dir)")


def _check_init(recipe: Recipe) -> Iterator[str]:
    init = recipe.init
    if init.source is None:
        if init.optimizer == "keep":
            yield "init.optimizer: keep, and init.from names no run whose moments could be kept; set it to fresh"
    elif Path(init.source).resolve().is_relative_to(recipe.folder.resolve()):
        yield (f"init.from: {init.source} is this run's own folder; give the new run another name or run_dir (to "
               "resume the run itself, leave init away)")


def _check_phases(recipe: Recipe) -> Iterator[str]:
    phases, steps = recipe.data.phases, recipe.train.steps
    if phases == []:
        yield "data.phases: [] has no phase; give [{streams: [{path: FOLDER, tokens: 2e9}]}, ...] or null"
    planned = 0
    for number, phase in enumerate(phases or ()):
        paths = [stream.path for stream in phase.streams]
        for place, stream in enumerate(phase.streams):
            if stream.tokens != int(stream.tokens):
                yield (f"data.phases.{number}.streams.{place}.tokens: {stream.tokens} is no whole number; give tokens, "
                       "such as 2e9")
            if stream.path in paths[:place]:
                yield (f"data.phases.{number}.streams.{place}.path: {stream.path} is there twice; name it once, with "
                       "all its tokens")
            planned += recipe.samples_of(stream.tokens)
    if planned > recipe.samples_before(steps):
        tokens = recipe.train.sequence_length
        yield (f"data.phases: {planned * tokens:,} tokens together, and train.steps = {steps:,} read "
               f"{recipe.samples_before(steps) * tokens:,}; take more steps or fewer tokens")


def check_world(recipe: Recipe, world_size: int) -> Iterator[str]:
    """The first problem with the number of processes; later ones follow from it."""
    train, parallel = recipe.train, recipe.parallel
    ranks, stages = parallel.model_ranks, parallel.pipeline
    if world_size % ranks:
        yield (f"parallel: tensor x pipeline x context = {ranks} does not divide the {world_size} processes started; "
               f"start a multiple of {ranks}")
        return
    share, sharing = train.micro_batch_size * recipe.data_ranks(world_size), world_size // stages
    batches = [(f"train.batch_ramp.{n}.batch", stage.batch) for n, stage in enumerate(train.batch_ramp or ())]
    for path, batch in [("train.global_batch_size", train.global_batch_size), *batches]:
        if batch % share:
            yield f"{path}: {batch} is not a multiple of micro_batch_size x data-parallel ranks = {share}"
            return
        count = batch // share
        if parallel.virtual_pipeline > 1 and count % stages and not sharing % parallel.expert:
            where = "train.micro_batch_size" if path == "train.global_batch_size" else path
            yield (f"{where}: {count} micro-batches a step is not a multiple of parallel.pipeline = {stages}, which "
                   "the interleaved schedule needs")
            return
    if sharing % parallel.expert:
        yield f"parallel.expert: {parallel.expert} does not divide the {sharing} ranks of a pipeline stage"
