"""State of the delayed fp8 recipe: scales, and the amax histories from which they are computed.

Transformer Engine stores both in every quantized linear, outside parameters and optimizer, and would save them as
`_extra_state`: bytes that can run code when they are loaded. A resume without them is not bitwise, so
checkpoints contain them as plain tensors. They are maxima over all tensor, data and context ranks, equal on each rank,
so one rank's copy serves any layout. The other fp8 recipes have no state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hola_megatron.model.parameters import public_module_name, unwrapped

STATES = (("scaling_fwd", "scale"), ("scaling_fwd", "amax_history"), ("scaling_bwd", "scale"),
          ("scaling_bwd", "amax_history"))


def fp8_tensors(chunks: list[nn.Module]) -> dict[str, Tensor]:
    """{public name: tensor on the device} of every linear that has run with delayed scaling."""
    found = {}
    for name, module in _quantized(chunks):
        for direction, kind in STATES:
            value = getattr(module.fp8_meta.get(direction), kind, None)
            if value is not None:
                found[f"{name}.{direction}.{kind}"] = value
    return found


@torch.no_grad()
def restore_fp8(chunks: list[nn.Module], recipe: Any, stored: dict[str, Tensor]) -> None:
    """Restore the scales and histories of all linears.

    recipe: Transformer Engine's, of the resumed run. stored: as from `fp8_tensors`; linears without an entry are reset.
    A history of another length is truncated or padded with zeros.
    """
    for name, module in _quantized(chunks):
        values = {state: stored.get(f"{name}.{state[0]}.{state[1]}") for state in STATES}
        if None in values.values():
            for direction, kind in STATES:
                if (state := getattr(module.fp8_meta.get(direction), kind, None)) is not None:
                    state.fill_(1.0 if kind == "scale" else 0.0)
            continue
        module.fp8_meta.update(recipe=recipe, num_gemms=1)
        module.init_fp8_meta_tensors(recipe)
        for (direction, kind), value in values.items():
            state = getattr(module.fp8_meta[direction], kind)
            if kind == "amax_history":
                state.zero_()
                rows = min(len(state), len(value))
                state[:rows].copy_(value[:rows])
            else:
                state.copy_(value)


def _quantized(chunks: list[nn.Module]) -> Iterator[tuple[str, Any]]:
    """(public name, module) of Transformer Engine's linears."""
    for chunk in chunks:
        whole = unwrapped(chunk)
        for name, module in whole.named_modules():
            if name.startswith("decoder.layers.") and hasattr(module, "fp8_meta") and hasattr(module, "weight"):
                yield public_module_name(name, whole), module
