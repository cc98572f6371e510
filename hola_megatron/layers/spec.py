"""The declaration of a layer kind: `Parameter`, one row of its parameter table, and `LayerKind`, everything else.

Importable without torch. Letters in comments: D model width, H heads, K and V key and value width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from hola_megatron.layers.costs import Share, Term
from hola_megatron.layers.initial import normal

if TYPE_CHECKING:
    import torch

    from hola_megatron.layers.exported.kind_hola import ExportedKind
    from hola_megatron.layers.recipe_view import ModelConfig, Recipe

Initial = Callable[[tuple[int, ...], "torch.Generator", "ModelConfig"], "torch.Tensor"]


@dataclass(frozen=True)
class Parameter:
    """One logical tensor of a mixer.

    name: public name inside the mixer, as checkpoints and exports have it ("q_proj.weight").
    shape: of the whole tensor, before it is sharded over tensor ranks.
    stored_in: attribute of the Megatron mixer that stores it. Rows with the same attribute are concatenated along
        axis 0 into one fused parameter, in the order of the table.
    partition_dim: axis that is sharded over tensor ranks; None: replicated.
    init: function of the initial value, with a generator of its own.
    float32: float32 also in a bf16 model (decay, gates).
    muon: the matrix that Muon orthogonalises: each head's rows ("heads") or the whole tensor; None: uses AdamW.
    heads: heads that share the rows, where these are not the kind's heads (grouped queries).
    part: part of the parameter counts: "mixer" or "exact_cache".
    """

    name: str
    shape: tuple[int, ...]
    stored_in: str
    partition_dim: int | None = 0
    init: Initial = normal
    float32: bool = False
    muon: Literal["heads", "whole"] | None = None
    part: Literal["mixer", "exact_cache"] = "mixer"
    heads: int | None = None

    @property
    def size(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def is_linear(self) -> bool:
        """Whether it is a weight of the fused input projection or of the output projection."""
        return self.stored_in in ("in_proj.weight", "out_proj.weight")

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies: to matrices, not to vectors. Both engines decide by the number of axes."""
        return len(self.shape) > 1


class LayerKind:
    """A kind of layer. Subclass it in a folder of its own and add one line to registry.py.

    name, letter: its names in a recipe's pattern; letter None: by name only.
    summary: one line for the documentation.
    recipe_fields: fields of the recipe's model section that this kind uses and some other kinds do not.
    memory_grows: whether the decoding state grows with the sequence (softmax attention).
    fla_role: the layer of flash-linear-attention's GatedDeltaNet model that it corresponds to, if any.
    time_part: the profiler's part for time in the mixer outside of all `timed_functions`.
    """

    name: str
    letter: str | None = None
    summary: str
    recipe_fields: tuple[str, ...] = ()
    memory_grows: bool = False
    fla_role: Literal["delta rule", "delta rule with cache", "softmax"] | None = None
    time_part: str

    def __repr__(self) -> str:
        return f"<layer kind {self.name}>"

    @property
    def title(self) -> str:
        """Its name in texts: the summary up to the colon."""
        return self.summary.partition(":")[0]

    @property
    def label(self) -> str:
        """Its short name: the letter if it has one."""
        return self.letter or self.name

    # parameters and modules

    def parameters(self, model: ModelConfig) -> tuple[Parameter, ...]:
        """The parameter table. Rows of the fused input projection are in the order of its sections."""
        raise NotImplementedError

    def states(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a mixer's float32 buffers that training changes without an optimizer.

        They are equal on all ranks of a pipeline stage, in checkpoints beside the parameters, and in exports under the
        same names. `Mixer.end_step` updates them.
        """
        return {}

    def further_projections(self, model: ModelConfig) -> dict[str, int]:
        """Names and rows of the projections that only its exact part has; a model without one lacks them."""
        return {}

    def mixer(self) -> type:
        """The Megatron module (layers/mixer.py); imports torch."""
        raise NotImplementedError

    def heads(self, model: ModelConfig) -> int:
        """Number of heads of the whole model; tensor ranks shard them."""
        raise NotImplementedError

    def head_width(self, model: ModelConfig) -> int:
        """Key width of a head, in channels."""
        raise NotImplementedError

    def exported(self) -> ExportedKind:
        """Its module and decoding state in exported models (layers/*/export.py); imports torch."""
        raise NotImplementedError

    # costs

    def forward_flops(self, model: ModelConfig, length: int) -> float:
        """FLOPs of one token's forward pass in a document of `length` tokens, without linears."""
        raise NotImplementedError

    def saved(self, share: Share) -> list[Term]:
        """Tensors that the mixer saves for its backward pass, for one micro-batch on one rank."""
        raise NotImplementedError

    def workspace(self, share: Share) -> float:
        """Peak bytes of the mixer's backward pass, saved tensors not counted."""
        raise NotImplementedError

    def messages(self, share: Share) -> float:
        """Bytes of context-parallel message buffers that are alive at the peak."""
        return 0.0

    # recipe checks; a problem is one line, "path: value ... what to do"

    def check_sizes(self, recipe: Recipe) -> Iterator[str]:
        """Problems of sizes that must be divisible."""
        return iter(())

    def check_cuda_graph(self, recipe: Recipe) -> Iterator[str]:
        """Problems of capturing a micro-batch with such layers in a CUDA graph."""
        return iter(())

    def fp8_widths(self, model: ModelConfig) -> list[tuple[str, int]]:
        """(dotted path, size) of sizes that fp8 needs to be multiples of 16 on every tensor rank."""
        return []

    def least_tokens(self, model: ModelConfig) -> int:
        """Minimum of tokens per row on a context-parallel rank."""
        return 1

    def kernel_problem(self, model: ModelConfig) -> str | None:
        """Why the Triton kernels do not support layers of this shape; None if they do."""
        return None

    def timed_flops(self, model: ModelConfig, length: int) -> float:
        """`forward_flops` as the plan's speed counts them: more where kernels are slower than those of the state."""
        return self.forward_flops(model, length)

    def launching(self, recipe: Recipe) -> float:
        """Host time to launch a layer without a CUDA graph, beside that of a gdn or hola layer (plan/speed.py)."""
        return 1.0

    def speed_note(self, recipe: Recipe) -> str | None:
        """What runs on a GPU have not shown of the plan's speed of these layers; None: it is near that of a run."""
        return f"{self.name} layers"

    def card_text(self, config: dict[str, Any]) -> str:
        """A sentence for an exported model's card about its layers of this kind; config: its config.json."""
        return ""

    def fla_problem(self, model: ModelConfig) -> str | None:
        """Why it cannot be compared with flash-linear-attention's Gated DeltaNet; None if it can."""
        return f"model.pattern: {model.pattern} has {self.name} layers; the comparison takes hola and gdn"

    def comparison_length(self, model: ModelConfig) -> int:
        """Sequence length in tokens that uses every part of the layer, for comparing two implementations."""
        return 80

    # profiling and statistics

    def timed_functions(self) -> Iterator[tuple[str, str, str]]:
        """(module, function, part): the profiler adds the time of `module.function` to `part`."""
        return iter(())

    def health(self) -> ModuleType | None:
        """The module with statistics of the layer's memory (layers/hola/health.py); None: no statistics."""
        return None

    def inspection(self) -> ModuleType | None:
        """The module that shows what the layer's memory did with a text (layers/inspection.py); None: nothing to show.
        """
        return None
