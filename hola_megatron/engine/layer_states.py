"""Tensors of layers that training changes without an optimizer (`LayerKind.states`), such as a threshold.

Layers count in their training passes (`Mixer.step_counts`). After a step the counts are added over all ranks that have
the layer, so every rank makes the same update, whatever the layout. A step that is not made changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from hola_megatron.errors import CheckpointError
from hola_megatron.layers.mixer import Mixer
from hola_megatron.model.parameters import public_module_name, unwrapped


class LayerStates:
    """Those of this rank's model chunks."""

    def __init__(self, chunks: list[nn.Module]):
        self._mixers = dict(_mixers(chunks))

    def tensors(self) -> dict[str, Tensor]:
        """{public name: tensor}, equal on all ranks of a pipeline stage."""
        return {f"{layer}.{name}": x for layer, mixer in self._mixers.items() for name, x in mixer.states().items()}

    @torch.no_grad()
    def restore(self, stored: dict[str, Tensor]) -> None:
        """Set them all. CheckpointError for one that is not stored, or of another shape."""
        for name, tensor in self.tensors().items():
            if name not in stored or stored[name].shape != tensor.shape:
                raise CheckpointError(f"the checkpoint has no {name} of shape {list(tensor.shape)}; it belongs to "
                                      "another model, use the recipe it was saved with")
            tensor.copy_(stored[name])

    def end_step(self) -> None:
        """Update the states by what the step has counted. A collective of a pipeline stage, where layers count."""
        counting = [mixer for mixer in self._mixers.values() if mixer.step_counts() is not None]
        if not counting:
            return
        counts = [mixer.step_counts().clone() for mixer in counting]
        together = torch.cat([x.flatten() for x in counts])
        dist.all_reduce(together, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
        for mixer, summed in zip(counting, together.split([x.numel() for x in counts]), strict=True):
            mixer.end_step(summed.view_as(mixer.step_counts()))

    def forget_step(self) -> None:
        """Drop what the step has counted."""
        for mixer in self._mixers.values():
            if (counts := mixer.step_counts()) is not None:
                counts.zero_()


def _mixers(chunks: list[nn.Module]) -> Iterator[tuple[str, Mixer]]:
    for whole in map(unwrapped, chunks):
        for name, module in whole.named_modules():
            if isinstance(module, Mixer) and module.kind.states(module.model):
                yield public_module_name(name, whole), module
