"""Tokens a second of a layout, from arithmetic and a dozen measured rates.

A micro-batch takes the device so long as its parts added up, or the host so long as launching them, whichever is longer
(with a CUDA graph there is no launching). A step is its micro-batches, the pipeline's bubble and the update:

    products     FLOPs of the layers' linears and of the output projection, at a rate that is lower for small widths
    mixers       FLOPs of state, cache attention and softmax attention, at a lower rate
    memory       what the layers keep for their backward passes (plan/activations.py), moved PASSES times; logits
    messages     what tensor and expert ranks send each other, at one rate; context ranks' share of the whole
    launching    a fixed time a layer of its kind: the host's, or what is left of it in a graph
    update       bytes of the optimizer's state, and the reduction of gradients over data ranks

`Rates` are fitted to runs on H200s (plan/measured.py has them all, with the fit's error of each). Other devices are
scaled by peak and memory bandwidth, without measurements. `unmeasured` lists what no run has measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from hola_megatron.layers.costs import Share
from hola_megatron.layers.registry import distinct
from hola_megatron.plan.activations import kernels_problem, saved_by_layer
from hola_megatron.plan.parameters import layer_products, rank_parameters, stage_layers
from hola_megatron.recipe.schema import Recipe

H200_PEAK, H200_BANDWIDTH = 989.4e12, 4.8e12  # dense bf16 FLOP/s and bytes/s by the datasheet
PASSES, LOGIT_PASSES = 4, 5   # memory passes over saved tensors, and over logits, in a forward and backward pass
SHARPNESS = 16                # of the maximum of device and host: near each other they wait for each other now and then
GPUS_A_NODE = 8


@dataclass(frozen=True)
class Rates:
    """What a H200 and its host do. FLOP/s are shares of the peak, bytes/s and seconds are plain."""

    products: float = 0.676       # fraction of the peak that large products reach
    half_width: float = 96.0      # at this model width, half of it
    experts: float = 0.41         # share of the peak of experts' products
    mixers: float = 0.332
    memory: float = 3.15e12
    messages: float = 251e9
    context: float = 1.13         # a micro-batch over context ranks, of one without
    context_layer: float = 0.75e-3
    device_layer: float = 0.81e-3  # a layer's many small kernels
    host_layer: float = 7.0e-3    # launching one layer, forward and backward; kinds with more launches say so
    host_layer_tensor: float = 8.7e-3  # with tensor ranks
    host_layer_context: float = 11e-3
    host_layer_experts: float = 26e-3
    update_bytes: float = 22.0    # a parameter of the optimizer's share
    update_fixed: float = 5e-3
    reduction: float = 119e9
    fp8_current: float = 0.817    # time of a product, of bf16's
    fp8_delayed: float = 0.774
    fp8_blockwise: float = 0.915


@dataclass(frozen=True)
class Speed:
    """One step. device, host: seconds of a micro-batch on the slowest pipeline stage; host is 0 in a CUDA graph."""

    tokens_per_second: float
    step: float
    device: float
    host: float
    update: float

    @property
    def launch_bound(self) -> bool:
        return self.host > self.device


def estimate_speed(recipe: Recipe, world: int, peak: float, bandwidth: float | None = None,
                   rates: Rates = Rates()) -> Speed:
    """A layout that divides `world` ranks. peak, bandwidth: of one device, FLOP/s and bytes/s (None: by the peak)."""
    bandwidth = bandwidth or H200_BANDWIDTH * peak / H200_PEAK
    memory = rates.memory * bandwidth / H200_BANDWIDTH
    count = recipe.micro_batches(world)
    parallel = recipe.parallel
    stages = [(_device(recipe, stage, peak, memory, rates), _host(recipe, stage, rates))
              for stage in {0, parallel.pipeline - 1}]
    device, host = max(stages, key=lambda times: _longer(*times))
    waiting = (parallel.pipeline - 1) / parallel.virtual_pipeline
    update = max(_update(recipe, world, stage, bandwidth, rates) for stage in {0, parallel.pipeline - 1})
    step = (count + waiting) * _longer(device, host) + update
    return Speed(recipe.tokens_per_step / step, step, device, host, update)


def unmeasured(recipe: Recipe, world: int, device: str | None) -> list[str]:
    """What of this layout no run has shown, or runs have shown to be predicted badly."""
    parallel, train, model = recipe.parallel, recipe.train, recipe.model
    kinds = distinct(model.layer_kinds)
    notes = [(device != "h200", "another device than H200 (scaled by peak and bandwidth)"),
             (world > GPUS_A_NODE or parallel.model_ranks > 4, "more than four GPUs, and any network between nodes"),
             (parallel.pipeline > 1, "pipeline ranks"), (train.optimizer == "muon", "Muon's own products"),
             (train.recompute == "full" and parallel.context == 1, "recompute"),
             (train.precision == "fp32", "float32 (counted as bf16)"),
             (recipe.engine == "deepspeed", "engine deepspeed (counted as Megatron's)"),
             (kernels_problem(Share(recipe)) is not None, "layers without Triton kernels"),
             *((True, text) for kind in kinds if (text := kind.speed_note(recipe))),
             (len(kinds) > 1, "layers of several kinds in one model"),
             (model.hidden_size < 1024, "models narrower than 1024 (runs of width 512 were up to a fifth slower)"),
             (bool(recipe.fp8.recipe) and (parallel.tensor > 1 or model.hidden_size != 2048),
              "fp8 at another width than 2048, or over tensor ranks"),
             (model.moe.experts is not None and parallel.expert != 4, "experts over another number of ranks than 4"),
             (parallel.tensor > 1 and not parallel.sequence, "tensor ranks without sequence parallelism")]
    return [text for applies, text in notes if applies]


def _longer(device: float, host: float) -> float:
    top = max(device, host)
    return top * ((device / top) ** SHARPNESS + (host / top) ** SHARPNESS) ** (1 / SHARPNESS)


def _device(recipe: Recipe, stage: int, peak: float, memory: float, rates: Rates) -> float:
    """Seconds that one micro-batch's forward and backward pass keep a rank of this stage busy."""
    model, parallel, share = recipe.model, recipe.parallel, Share(recipe)
    tokens, kinds, e = share.tokens, stage_layers(recipe, stage), share.number
    product_rate = peak * rates.products * model.hidden_size / (model.hidden_size + rates.half_width)
    factor = getattr(rates, f"fp8_{recipe.fp8.recipe}") if recipe.fp8.recipe else 1.0
    counted = [(kind, kinds.count(kind)) for kind in distinct(kinds)]
    linears = sum(layer_products(model, kind) * n for kind, n in counted) / parallel.tensor
    layers = 6 * linears * tokens * factor / product_rate
    if model.moe.experts is not None:
        weights = len(kinds) * model.moe.top_k * 3 * model.hidden_size * model.expert_hidden_size
        layers += 6 * weights * share.norm_tokens / (peak * rates.experts)
    mixed = sum(kind.timed_flops(model, recipe.train.sequence_length) * n for kind, n in counted)
    layers += 3 * mixed / parallel.tensor * tokens / (peak * rates.mixers)
    layers += PASSES * sum(term.bytes * n for kind, n in counted for term in saved_by_layer(share, kind)
                           if term.part != "context") / memory
    layers += _messages(recipe, len(kinds), tokens, e) / rates.messages
    layers += len(kinds) * rates.device_layer
    if parallel.context > 1:
        layers = layers * rates.context + len(kinds) * rates.context_layer
    if recipe.train.recompute == "full":
        layers *= 4 / 3
    if stage < parallel.pipeline - 1:
        return layers
    columns = model.vocab_size / parallel.tensor
    return layers + 6 * model.hidden_size * columns * tokens / product_rate \
        + LOGIT_PASSES * tokens * columns * e / memory


def _messages(recipe: Recipe, layers: int, tokens: int, e: int) -> float:
    """Bytes that a rank sends for one micro-batch: tensor ranks in every half of a layer, experts' tokens."""
    model, parallel = recipe.model, recipe.parallel
    # sequence parallelism: two gathers and a scatter of a half's input and its gradient, and the output's pair
    moved = (10 if parallel.sequence else 8) * (parallel.tensor - 1) / parallel.tensor * tokens
    if model.moe.experts is not None:
        moved += 4 * tokens * model.moe.top_k * (parallel.expert - 1) / parallel.expert
    return layers * moved * model.hidden_size * e


def _host(recipe: Recipe, stage: int, rates: Rates) -> float:
    """Seconds that the host needs to launch one micro-batch; 0 in a CUDA graph."""
    if recipe.train.cuda_graph:
        return 0.0
    parallel = recipe.parallel
    layer = max(rates.host_layer_experts if recipe.model.moe.experts is not None else rates.host_layer,
                rates.host_layer_tensor if parallel.tensor > 1 else 0.0,
                rates.host_layer_context if parallel.context > 1 else 0.0)
    launches = sum(kind.launching(recipe) for kind in stage_layers(recipe, stage))
    return launches * layer * (4 / 3 if recipe.train.recompute == "full" else 1)


def _update(recipe: Recipe, world: int, stage: int, bandwidth: float, rates: Rates) -> float:
    """Seconds of a step outside its micro-batches."""
    counts, parallel = rank_parameters(recipe, stage), recipe.parallel
    sharing = recipe.data_ranks(world) * parallel.context
    owned = counts.total / sharing if parallel.distributed_optimizer else counts.total
    reduced = 4 * counts.total * (sharing - 1) / sharing
    return rates.update_fixed + owned * rates.update_bytes / bandwidth * H200_BANDWIDTH / 4.3e12 \
        + reduced / rates.reduction
