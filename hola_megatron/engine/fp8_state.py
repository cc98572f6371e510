"""What the delayed fp8 recipe remembers from step to step: scales, and the largest numbers they come from.

Transformer Engine keeps both in every quantized linear, outside parameters and optimizer, and would save them as
`_extra_state`, bytes that run code when they are read. A resume without them is not bit for bit, so checkpoints hold
them as plain tensors. They are maxima over all tensor, data and context ranks, the same on each: one rank's copy is
the whole tensor, at any layout. The other recipes remember nothing.
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
    """Give every linear its scales and history back; `recipe`: Transformer Engine's, of the run that goes on.

    A history of another length is cut or filled up with zeros. Linears that `stored` does not name start anew.
    """
    for name, module in _quantized(chunks):
        values = {state: stored.get(f"{name}.{state[0]}.{state[1]}") for state in STATES}
        if None in values.values():
            for direction, kind in STATES:
                if (held := getattr(module.fp8_meta.get(direction), kind, None)) is not None:
                    held.fill_(1.0 if kind == "scale" else 0.0)
            continue
        module.fp8_meta.update(recipe=recipe, num_gemms=1)
        module.init_fp8_meta_tensors(recipe)
        for (direction, kind), value in values.items():
            held = getattr(module.fp8_meta[direction], kind)
            if kind == "amax_history":
                held.zero_()
                rows = min(len(held), len(value))
                held[:rows].copy_(value[:rows])
            else:
                held.copy_(value)


def _quantized(chunks: list[nn.Module]) -> Iterator[tuple[str, Any]]:
    """(public name, module) of Transformer Engine's linears."""
    for chunk in chunks:
        whole = unwrapped(chunk)
        for name, module in whole.named_modules():
            if name.startswith("decoder.layers.") and hasattr(module, "fp8_meta") and hasattr(module, "weight"):
                yield public_module_name(name, whole), module
