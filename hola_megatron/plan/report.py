"""A plan as one screen of text."""

from __future__ import annotations

from hola_megatron.layers.costs import Share
from hola_megatron.layers.registry import distinct
from hola_megatron.plan.activations import kernels_problem
from hola_megatron.plan.estimate import CLEARLY, Plan
from hola_megatron.plan.layouts import Suggestion
from hola_megatron.plan.memory import GB, StageMemory
from hola_megatron.plan.parameters import active_parameters
from hola_megatron.recipe.schema import Recipe


def report(plan: Plan) -> str:
    """The lines of tools/plan.py."""
    rows = [*_model(plan), *_work(plan), *_layout(plan), *_memory(plan), ("checkpoint", _checkpoint(plan)),
            ("fits", _verdict(plan)), *_suggestions(plan)]
    return "\n".join(f"{name:>10}  {text}" for name, text in rows)


def short(number: float) -> str:
    """1310000 -> 1.31M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def layout_text(recipe: Recipe, gpus: int) -> str:
    """tensor 2 x pipeline 4 x data 8, experts over 8; with sizes of 1 left out except data."""
    parallel = recipe.parallel
    names = [("tensor", parallel.tensor), ("context", parallel.context), ("pipeline", parallel.pipeline)]
    sharded = [f"{name} {size}" for name, size in names if size > 1]
    ranks = " x ".join([*sharded, f"data {gpus // parallel.model_ranks}"])
    return f"{ranks}, experts over {parallel.expert}" if parallel.expert > 1 else ranks


def _model(plan: Plan) -> list[tuple[str, str]]:
    model, counts = plan.recipe.model, plan.parameters
    kinds = model.layer_kinds
    layers = " + ".join(f"{kinds.count(kind)}{kind.label}" for kind in distinct(kinds))
    parts = ", ".join(f"{name.replace('_', ' ')} {short(size)}" for name, size in counts.items()
                      if name != "total" and size)
    rows = [("recipe", f"{plan.recipe.name}: {layers} layers of width {model.hidden_size}"),
            ("parameters", f"{short(counts['total'])} = {parts}")]
    if model.moe.experts is None:
        return rows
    return [*rows, ("active", f"{short(active_parameters(model))} for a token: {model.moe.top_k} of "
                              f"{model.moe.experts} experts in every layer")]


def _work(plan: Plan) -> list[tuple[str, str]]:
    train, machine = plan.recipe.train, plan.machine
    rows = [("flops", f"{plan.flops_per_token / 1e9:.3g} GFLOP a token at {train.sequence_length} tokens, "
                      f"{plan.flops_per_token * plan.tokens:.2e} in all"),
            ("steps", f"{train.steps:,} of {short(plan.recipe.tokens_per_step)} tokens = {short(plan.tokens)} tokens")]
    if plan.hours is None:
        return rows + [("time", "not stated: give --device or --peak-tflops")]
    how = "as given" if machine.mfu is not None else "predicted"
    rows.append(("time", f"{plan.hours:,.1f} hours on {machine.gpus} GPUs at MFU {100 * plan.mfu:.3g} % of "
                         f"{machine.peak_flops / 1e12:g} TFLOP/s ({how}): {short(plan.tokens_per_second)} tokens/s, "
                         f"{short(plan.tokens_per_second / machine.gpus)} a GPU"))
    return rows if machine.mfu is not None or plan.speed is None else rows + _predicted(plan)


def _predicted(plan: Plan) -> list[tuple[str, str]]:
    """What limits the predicted speed, and which parts of the prediction are not measured."""
    speed = plan.speed
    rows = [("", f"a micro-batch takes the device {1e3 * speed.device:.3g} ms"
                 + (f", launching it {1e3 * speed.host:.3g} ms of the host" if speed.host else " in a CUDA graph")
                 + f"; the update {1e3 * speed.update:.3g} ms a step")]
    if speed.launch_bound:
        rows.append(("", "bound by launching, at which hosts differ: two of seven such runs were 16 and 26 % slower "
                         "than predicted"))
    graph = plan.with_graph
    if graph and graph.tokens_per_second > CLEARLY * speed.tokens_per_second:
        times = graph.tokens_per_second / speed.tokens_per_second
        rows.append(("", f"train.cuda_graph=true: {times:.2f} times as fast "
                         f"({short(graph.tokens_per_second)} tokens/s), with up to 4 GB more, not counted below"))
    if plan.unmeasured:
        rows.append(("", f"not measured: {'; '.join(plan.unmeasured)}"))
    return rows


def _layout(plan: Plan) -> list[tuple[str, str]]:
    if plan.problems:
        return [("layout", problem) for problem in plan.problems]
    train, parallel = plan.recipe.train, plan.recipe.parallel
    rows = [("layout", f"{plan.machine.gpus} ranks = {layout_text(plan.recipe, plan.machine.gpus)}; "
                       f"{plan.micro_batches} micro-batches of {train.micro_batch_size} x {train.sequence_length} "
                       f"tokens a step and data rank")]
    choices = [f"recompute {train.recompute}"]
    if plan.recompute_share:
        choices[0] += f" (+{100 * plan.recompute_share:.0f} % work, not in MFU)"
    if parallel.sequence:
        choices.append("norms and residuals cut over tensor ranks")
    if plan.recipe.engine == "deepspeed":
        choices.append(f"DeepSpeed ZeRO {parallel.zero_stage}: optimizer state" +
                       (" and gradients" if parallel.zero_stage > 1 else "") + " cut over data and context ranks")
    elif parallel.distributed_optimizer:
        choices.append("optimizer state cut over data and context ranks")
    if parallel.pipeline > 1:
        choices.append(f"pipeline bubble {100 * plan.bubble:.1f} % (not in MFU)")
    layers = "Megatron's own layers (set by the recipe)" if plan.recipe.model.layer_spec == "local" else \
        "Transformer Engine's layers"
    return rows + [("", "; ".join(choices)), ("assumes", f"{_kernels(plan.recipe)}; {layers}")]


def _kernels(recipe: Recipe) -> str:
    problem = kernels_problem(Share(recipe))
    return f"NOT Triton kernels ({problem}): more memory than shown" if problem else "Triton kernels"


def _memory(plan: Plan) -> list[tuple[str, str]]:
    if plan.memory is None:
        return []
    memory, stages = plan.memory, plan.recipe.parallel.pipeline
    where = f", stage {memory.stage + 1} of {stages} (the worst)" if stages > 1 else ""
    head = f"of a rank{where}, GB at its peak (moment: {memory.moment})"
    lines = [("memory", head)]
    for name, size in memory.parts.items():
        if size:
            lines.append(("", f"{size / GB:8.2f}  {name.ljust(12)}{EXPLAINED[name]}"))
    return lines + [("", f"{memory.allocated / GB:8.2f}  allocated, {memory.total / GB:.2f} with the reserve")]


EXPLAINED = {
    "weights": "in the recipe's precision", "gradients": "float32 buffer",
    "optimizer": "float32 weights and two moments", "activations": "saved by norms, linears and MLP",
    "kernels": "saved by convolution, state, cache attention, softmax attention and output norm",
    "workspace": "of one layer's backward pass", "logits": "output projection and loss",
    "messages": "tensor, context and pipeline buffers", "libraries": "cuBLAS workspaces",
    "reserve": "CUDA context, NCCL, fragmentation (a choice)"}


def _checkpoint(plan: Plan) -> str:
    keep = plan.recipe.checkpoint.keep
    size = plan.checkpoint_bytes / GB
    return f"{size:.3g} GB, every {plan.recipe.checkpoint.every:,} steps, {keep} retained = {keep * size:.3g} GB"


def _verdict(plan: Plan) -> str:
    if plan.memory is None:
        return f"no: the layout does not go with {plan.machine.gpus} GPUs"
    return f"{'yes' if plan.fits else 'no'}, {_of(plan.memory, plan.machine.memory_gb)}"


def _of(memory: StageMemory, memory_gb: float) -> str:
    return f"{memory.total / GB:.3g} of {memory_gb:g} GB"


def _suggestions(plan: Plan) -> list[tuple[str, str]]:
    if not plan.suggestions and plan.fits:
        return []
    if not plan.suggestions:
        return [("suggest", f"nothing: no cut of this model and batch over {plan.machine.gpus} GPUs fits "
                            f"{plan.machine.memory_gb:g} GB; change the number of GPUs or train.global_batch_size "
                            f"({plan.recipe.train.global_batch_size} samples a step)")]
    rows = []
    for number, found in enumerate(plan.suggestions):
        name = "or" if number else "also fits" if plan.fits else "suggest"
        rows.append((name, " ".join(found.overrides)))
        rows.append(("", f"    {layout_text(found.recipe, plan.machine.gpus)}, "
                         f"{_of(found.memory, plan.machine.memory_gb)}{_price(found)}{_pace(plan, found)}"))
    return rows


def _pace(plan: Plan, found: Suggestion) -> str:
    """The speed of a suggested layout, compared with the recipe's where that can run."""
    if found.tokens_per_second is None:
        return "; which is faster is not known without --device or --peak-tflops" if plan.fits else ""
    text = f"; predicted {short(found.tokens_per_second)} tokens/s"
    return f"{text}, {found.tokens_per_second / plan.speed.tokens_per_second:.2f} times as fast" if plan.fits else text


def _price(found: Suggestion) -> str:
    return ", every layer's forward pass done twice" if found.recipe.train.recompute == "full" else ""
