"""Gated DeltaNet (arXiv 2412.06464): a decaying linear-attention state written by the delta rule, no exact cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from hola_megatron.layers.costs import Share, Term
from hola_megatron.layers.gdn import costs
from hola_megatron.layers.gdn.limits import KERNEL_TAPS, KERNEL_WIDTHS
from hola_megatron.layers.initial import ones
from hola_megatron.layers.spec import LayerKind, Parameter

if TYPE_CHECKING:
    import torch

    from hola_megatron.layers.exported.kind_hola import ExportedKind
    from hola_megatron.layers.recipe_view import ModelConfig, Recipe


class GatedDeltaNet(LayerKind):
    """Gated DeltaNet (arXiv 2412.06464)."""

    name, letter = "gdn", "G"
    summary = "Gated DeltaNet: a compressed state, no exact cache"
    recipe_fields = ("heads", "key_dim", "value_dim", "conv_width", "rule", "beta_range", "state_delay",
                     "state_delay_mode")
    fla_role = "delta rule"
    time_part = "gates and layout"

    def parameters(self, model: ModelConfig) -> tuple[Parameter, ...]:
        width, heads = model.hidden_size, model.heads
        key, value = heads * model.key_dim, heads * model.value_dim
        widths = {"q": key, "k": key, "v": value, "g": value, **self.further_projections(model)}
        widths |= dict.fromkeys({"gdn": ("b", "a"), "delta": ("b",), "none": ()}[model.rule], heads)
        rows = [Parameter(f"{name}_proj.weight", (size, width), stored_in="in_proj.weight", muon="heads")
                for name, size in widths.items()]
        rows += [Parameter(f"{name}_conv.weight", (widths[name], model.conv_width), stored_in="conv_weight",
                           init=convolution) for name in "qkv"]
        if model.rule == "gdn":
            rows += [Parameter("A_log", (heads,), stored_in="A_log", init=decay_rate, float32=True),
                     Parameter("dt_bias", (heads,), stored_in="dt_bias", init=step_bias, float32=True)]
        rows += [Parameter("o_norm.weight", (model.value_dim,), stored_in="o_norm", partition_dim=None, init=ones),
                 Parameter("o_proj.weight", (width, value), stored_in="out_proj.weight", partition_dim=1, muon="whole")]
        return tuple(rows)

    def mixer(self) -> type:
        from hola_megatron.layers.gdn.mixer import GatedDeltaMixer

        return GatedDeltaMixer

    def exported(self) -> ExportedKind:
        from hola_megatron.layers.gdn.export import KIND

        return KIND

    def heads(self, model: ModelConfig) -> int:
        return model.heads

    def head_width(self, model: ModelConfig) -> int:
        return model.key_dim

    def forward_flops(self, model: ModelConfig, length: int) -> float:
        return costs.forward_flops(model)

    def saved(self, share: Share) -> list[Term]:
        return costs.saved(share, self) + (
            costs.saved_over_ranks(share, self) if share.recipe.parallel.context > 1 else [])

    def workspace(self, share: Share) -> float:
        return costs.workspace(share, self)

    def messages(self, share: Share) -> float:
        return costs.messages(share, self)

    def check_sizes(self, recipe: Recipe) -> Iterator[str]:
        heads, ranks = recipe.model.heads, recipe.parallel.tensor
        if heads % ranks:
            yield f"model.heads: {heads} is not a multiple of {ranks} (parallel.tensor = {ranks} shards heads)"
        yield from self.check_rule(recipe)
        yield from self.check_state_delay(recipe)

    def check_rule(self, recipe: Recipe) -> Iterator[str]:
        """What a layer without a state does not go with."""
        if recipe.model.rule == "none":
            yield (f"model.rule: none is for hola layers, and {self.name} layers read a state; set it to gdn or delta, "
                   f"or model.pattern to H, W and A without {self.name}")

    def check_state_delay(self, recipe: Recipe) -> Iterator[str]:
        """What a delayed state does not go with."""
        delay, context = recipe.model.state_delay, recipe.parallel.context
        if delay and context > 1:
            yield (f"model.state_delay: {delay} is not possible with parallel.context = {context}; set it to 0, or "
                   "parallel.context to 1")

    def check_cuda_graph(self, recipe: Recipe) -> Iterator[str]:
        model = recipe.model
        if model.state_delay:
            yield (f"model.state_delay: {model.state_delay} is not possible with train.cuda_graph; set it to 0, or "
                   "train.cuda_graph to false")
        if model.backend not in ("auto", "triton"):
            yield (f"model.backend: {model.backend} is not possible with train.cuda_graph; set it to auto or triton, "
                   "or train.cuda_graph to false")
        for name in ("key_dim", "value_dim"):
            if getattr(model, name) not in KERNEL_WIDTHS:
                yield (f"model.{name}: {getattr(model, name)} is not possible with train.cuda_graph, whose kernels "
                       f"take {', '.join(map(str, KERNEL_WIDTHS))}; set it to one, or train.cuda_graph to false")
        if model.conv_width > KERNEL_TAPS:
            yield (f"model.conv_width: {json.dumps(model.conv_width)} is not possible with train.cuda_graph, whose "
                   f"kernels take {KERNEL_TAPS} at most; make it smaller, or set train.cuda_graph to false")

    def fp8_widths(self, model: ModelConfig) -> list[tuple[str, int]]:
        return [("model.heads x model.value_dim", model.heads * model.value_dim)]

    def least_tokens(self, model: ModelConfig) -> int:
        """A window of the convolution spans two ranks at most."""
        return max(1, model.conv_width - 1)

    def speed_note(self, recipe: Recipe) -> str | None:
        return f"{self.name} layers whose state is read late" if recipe.model.state_delay else None

    def kernel_problem(self, model: ModelConfig) -> str | None:
        if model.key_dim not in KERNEL_WIDTHS or model.value_dim not in KERNEL_WIDTHS:
            return f"key_dim {model.key_dim} or value_dim {model.value_dim} is not one of 64, 128, 256"
        if model.conv_width > KERNEL_TAPS:
            return f"conv_width {model.conv_width} is above {KERNEL_TAPS}"
        return None

    def fla_problem(self, model: ModelConfig) -> str | None:
        if model.state_delay:
            return f"model.state_delay: {model.state_delay}; their Gated DeltaNet has no delayed state"
        return None if model.rule == "gdn" else f"model.rule: {model.rule}; their Gated DeltaNet always decays"

    def inspection(self) -> ModuleType | None:
        """Kinds that extend this one write and read in their own ways, and have modules of their own."""
        from hola_megatron.layers.gdn import inspection

        return inspection if type(self) is GatedDeltaNet else None

    def timed_functions(self) -> Iterator[tuple[str, str, str]]:
        from hola_megatron.layers.gdn.timing import timed_functions

        return timed_functions()


# initial values: those of the modules in hola_kernels, imported when a model is built

def convolution(shape: tuple[int, ...], generator: torch.Generator, model: ModelConfig) -> torch.Tensor:
    """Initial value of the short convolutions, as in hola_kernels.modules."""
    from hola_kernels.modules import initial

    return initial.convolution(shape, generator)


def decay_rate(shape: tuple[int, ...], generator: torch.Generator, model: ModelConfig) -> torch.Tensor:
    """Initial value of A_log, as in hola_kernels.modules."""
    from hola_kernels.modules import initial

    return initial.decay_rate(shape, generator)


def step_bias(shape: tuple[int, ...], generator: torch.Generator, model: ModelConfig) -> torch.Tensor:
    """Initial value of dt_bias, as in hola_kernels.modules."""
    from hola_kernels.modules import initial

    return initial.step_bias(shape, generator)


GDN = GatedDeltaNet()
