"""HOLA (arXiv 2607.02303): Gated DeltaNet with a bounded exact key-value cache.

Besides the compressed state, every token attends (softmax) to the w earlier tokens per head with the largest residual
written to the state, and to its own block.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hola_megatron.layers.costs import Share, Term
from hola_megatron.layers.gdn import GatedDeltaNet
from hola_megatron.layers.gdn import costs as state_costs
from hola_megatron.layers.hola import costs
from hola_megatron.layers.initial import ones, zeros
from hola_megatron.layers.spec import Parameter

if TYPE_CHECKING:
    import torch

    from hola_megatron.layers.exported.kind_hola import ExportedKind
    from hola_megatron.layers.recipe_view import CacheConfig, ModelConfig, Recipe

WINDOW_COLUMNS = 64  # tokens of a tile of keys (hola_kernels.exact_cache.read_configs)
STATE_SCORES, POSITION_SCORES = ("betae", "e", "betav"), ("recency", "random")  # as in hola_kernels.options
LAUNCHING_PARTS = 1.6  # where state and read are operations of their own, of the score cosine (docs/plan.md)
STATELESS_SCORES = (*POSITION_SCORES, "betav", "learned")


class Hola(GatedDeltaNet):
    """HOLA (arXiv 2607.02303): Gated DeltaNet with an exact cache."""

    name, letter = "hola", "H"
    summary = "HOLA: Gated DeltaNet with an exact cache"
    recipe_fields = (*GatedDeltaNet.recipe_fields, "cache")
    fla_role = "delta rule with cache"

    def parameters(self, model: ModelConfig) -> tuple[Parameter, ...]:
        def row(name: str, size: int, **how) -> Parameter:
            return Parameter(name, (size,), stored_in=name, float32=True, part="exact_cache", **how)

        rows = [row("gamma_q", model.key_dim, partition_dim=None, init=ones),
                row("gamma_k", model.key_dim, partition_dim=None, init=ones),
                *([row("gate", model.heads, init=read_gate)] if has_gate(model) else [])]
        if model.cache.sink:
            rows.append(row("sink", model.heads, init=zeros))
        if model.cache.score == "learned":
            width = model.cache.router_width
            rows += [Parameter("route_out", (model.heads, width), stored_in="route_out", float32=True,
                               part="exact_cache"),
                     row("route_bias", model.heads, init=zeros)]
        return (*super().parameters(model), *rows)

    def further_projections(self, model: ModelConfig) -> dict[str, int]:
        numbers = {"mix": {"add": 0, "convex": model.value_dim, "two": 2}[model.cache.merge],
                   "route": model.cache.router_width if model.cache.score == "learned" else 0}
        return {name: model.heads * size for name, size in numbers.items() if size}

    def mixer(self) -> type:
        from hola_megatron.layers.hola.mixer import HolaMixer

        return HolaMixer

    def exported(self) -> ExportedKind:
        from hola_megatron.layers.hola.export import KIND

        return KIND

    def forward_flops(self, model: ModelConfig, length: int) -> float:
        return super().forward_flops(model, length) + costs.read_flops(model, length)

    def check_rule(self, recipe: Recipe) -> Iterator[str]:
        model, cache, context = recipe.model, recipe.model.cache, recipe.parallel.context
        if model.rule != "none":
            return
        if cache.slots and cache.score not in STATELESS_SCORES:
            yield (f"model.cache.score: {cache.score} is made from a state, and model.rule is none; set it to "
                   f"{', '.join(STATELESS_SCORES[:-1])} or {STATELESS_SCORES[-1]}, or model.cache.slots to 0")
        if not cache.slots and (costs.reach(cache) or cache.block) == 1 and not cache.sink:
            yield ("model.cache.sink: false, and a token would read itself alone (no state, no slots, no local part), "
                   "its q and k without effect; give model.cache.slots or a local part")
        for path, value, allowed in (("model.cache.merge", cache.merge, "add"),
                                     ("model.state_delay", model.state_delay, 0), ("parallel.context", context, 1)):
            if value != allowed:
                yield f"{path}: {value} is not possible with model.rule = none; set it to {allowed}"

    def saved(self, share: Share) -> list[Term]:
        terms = [*state_costs.saved(share, self), *costs.read_saved(share, self)]
        model = share.recipe.model
        fused = is_fused_over_ranks(model) if share.recipe.parallel.context > 1 else is_fused(model)
        if not fused or model.cache.score not in (*STATE_SCORES, *POSITION_SCORES):
            terms += costs.saved_unfused(share, self)
        if share.recipe.parallel.context > 1:
            terms += [*state_costs.saved_over_ranks(share, self), *costs.read_saved_over_ranks(share, self)]
        return terms

    def workspace(self, share: Share) -> float:
        # on one rank dv shares dr's memory; over ranks the attention's dq dk dv are alive during the state's backward
        sizes = {"keys": 2, "values": 3} if share.recipe.parallel.context == 1 else {"keys": 4, "values": 5}
        of_the_read = costs.read_workspace(share, self)
        if share.recipe.model.rule == "none":
            return of_the_read
        return max(state_costs.workspace(share, self, **sizes), of_the_read)

    def check_state_delay(self, recipe: Recipe) -> Iterator[str]:
        yield from super().check_state_delay(recipe)
        if recipe.model.state_delay and recipe.model.state_delay_mode != "stream":
            yield (f"model.state_delay_mode: {recipe.model.state_delay_mode} is for gdn layers; set it to stream with "
                   "hola layers")

    def check_cuda_graph(self, recipe: Recipe) -> Iterator[str]:
        if recipe.model.rule == "none":
            yield "model.rule: none is not possible with train.cuda_graph; set train.cuda_graph to false"
            return
        yield from super().check_cuda_graph(recipe)
        if recipe.model.cache.score not in STATE_SCORES:
            yield (f"model.cache.score: {recipe.model.cache.score} is not possible with train.cuda_graph; set it to "
                   "betae, e or betav, or train.cuda_graph to false")
        cache = recipe.model.cache
        if costs.reach(cache) is not None and cache.block % WINDOW_COLUMNS:
            yield (f"model.cache.block: {cache.block} is not possible with train.cuda_graph and model.cache.local = "
                   f"{cache.local}; set it to a multiple of {WINDOW_COLUMNS}, or train.cuda_graph to false")
        elif not _is_fused_read(cache):
            yield ("model.cache: read_norm none, rope_theta and merge other than add are not possible with "
                   "train.cuda_graph; change them, or set train.cuda_graph to false")

    def least_tokens(self, model: ModelConfig) -> int:
        """A cache block, and what a window reaches before it, spans two ranks at most."""
        return max(super().least_tokens(model), (1 + costs.window_blocks(model.cache)) * model.cache.block - 1)

    def kernel_problem(self, model: ModelConfig) -> str | None:
        if problem := super().kernel_problem(model):
            return problem
        if model.cache.score not in (*STATE_SCORES, *POSITION_SCORES):
            return f"score {model.cache.score} is computed by the composed operations"
        if costs.reach(model.cache) is not None and model.cache.block % WINDOW_COLUMNS:
            return f"cache.block {model.cache.block} of a window is not a multiple of {WINDOW_COLUMNS}"
        return None

    def launching(self, recipe: Recipe) -> float:
        return 1.0 if self._is_one_operation(recipe) else LAUNCHING_PARTS

    def _is_one_operation(self, recipe: Recipe) -> bool:
        fused = is_fused_over_ranks if recipe.parallel.context > 1 else is_fused
        return fused(recipe.model) and recipe.model.cache.score in (*STATE_SCORES, *POSITION_SCORES)

    def speed_note(self, recipe: Recipe) -> str | None:
        if recipe.model.rule == "none":
            return "hola layers without a state"
        if not self._is_one_operation(recipe) and recipe.model.cache.score != "cosine":
            return "hola layers that are not one fused operation"
        return super().speed_note(recipe)

    def check_sizes(self, recipe: Recipe) -> Iterator[str]:
        yield from super().check_sizes(recipe)
        cache = recipe.model.cache
        if cache.local == "window" and cache.window is None:
            yield "model.cache.window: null, and model.cache.local is window; give the window's tokens"
        if not cache.slots and cache.score in ("cosine", "learned"):
            yield (f"model.cache.score: {cache.score} selects nothing with model.cache.slots = 0; set it to betae, or "
                   "slots to 1 or more")
        if cache.rope_theta is not None and recipe.model.key_dim % 2:
            yield (f"model.key_dim: {recipe.model.key_dim} is odd, and model.cache.rope_theta rotates pairs of "
                   "channels; make it even, or set model.cache.rope_theta to null")
        if cache.local != "window" and cache.window is not None:
            yield (f"model.cache.window: {cache.window} belongs to model.cache.local = window, and local is "
                   f"{cache.local}; set it to null, or local to window")

    def card_text(self, config: dict[str, Any]) -> str:
        local = {"block": f"its own block of {config['cache_block']}",
                 "window": f"a sliding window of {config.get('cache_window')}", "none": "itself"}
        kept = "keeps no token exactly; a token attends to"
        if config["cache_slots"]:
            kept = (f"keeps {config['cache_slots']} tokens per head exactly, selected by `{config['cache_score']}`; a "
                    "token also attends to")
        if config.get("rule") == "none":
            kept = f"has no state; it {kept}"
        late = f" Its state is read {config['state_delay']} tokens late." if config.get("state_delay") else ""
        return f"A HOLA layer {kept} {local[config.get('cache_local', 'block')]}.{late} "

    def comparison_length(self, model: ModelConfig) -> int:
        return (2 + costs.window_blocks(model.cache)) * model.cache.block + 17

    def inspection(self) -> ModuleType:
        from hola_megatron.layers.hola import inspection

        return inspection

    def timed_functions(self) -> Iterator[tuple[str, str, str]]:
        from hola_megatron.layers.hola.timing import timed_functions

        yield from super().timed_functions()
        yield from timed_functions()

    def health(self) -> ModuleType:
        from hola_megatron.layers.hola import health

        return health


def is_fused(model: ModelConfig) -> bool:
    """Whether state and cache attention have one fused operation; otherwise their two operations run one by one."""
    return _is_fused_read(model.cache) and not model.state_delay and model.rule != "none"


def _is_fused_read(cache: CacheConfig) -> bool:
    return (cache.read_norm != "none" and cache.merge == "add" and cache.rope_theta is None
            and (costs.reach(cache) is None or cache.block % WINDOW_COLUMNS == 0))


def is_fused_over_ranks(model: ModelConfig) -> bool:
    """The same over context ranks."""
    return is_fused(model) and model.cache.local == "block" and model.cache.slots > 0


def has_gate(model: ModelConfig) -> bool:
    """Whether a head has a gate of its own: its read is added to a state's output."""
    return model.cache.merge == "add" and model.rule != "none"


def read_gate(shape: tuple[int, ...], generator: torch.Generator, model: ModelConfig) -> torch.Tensor:
    """cache.gate_init, before its sigmoid."""
    import torch

    return torch.full(shape, model.cache.gate_init)


HOLA = Hola()
