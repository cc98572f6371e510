"""Whether the kernels of a layer fit the shared memory of a GPU: widths that do not are refused by name.

Bytes of the kernel that needs most, forward and backward, sequences in spans included, as
`tests/kernels/compile_for_hopper.py` finds them; a test compiles them again. A block may have 227 KB on compute
capability 9.0 and 10.0, 163 KB on 8.0, 99 KB on 8.6, 8.9 and 12.0; where it has less than SMALL, the launch tables have
smaller tiles. From 9.0 on whole tiles are copied into shared memory, more of them ahead, than where threads load them
(8.x).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SMALL = 128 * 1024  # a GPU whose blocks have less takes the small rows of the launch tables
# (16-bit numbers, wider of K and V, at least 64) -> bytes, by compute capability
NEEDED = {
    "8.0": {(True, 64): 40_960, (True, 128): 131_072, (True, 256): 147_712, (False, 64): 65_536, (False, 128): 131_072,
            (False, 256): 163_840},
    "8.6": {(True, 64): 40_960, (True, 128): 65_536, (True, 256): 98_304, (False, 64): 65_536, (False, 128): 131_072,
            (False, 256): 163_840},
    "9.0": {(True, 64): 49_208, (True, 128): 219_336, (True, 256): 218_260, (False, 64): 49_152, (False, 128): 98_304},
    "12.0": {(True, 64): 32_800, (True, 128): 65_552, (True, 256): 81_936, (False, 64): 49_152, (False, 128): 163_840,
             (False, 256): 196_608},
}


def shared_memory_refusal(k: Tensor, v: Tensor) -> str | None:
    """Why the kernels of these widths do not run on the GPU of k, or None."""
    if not k.is_cuda:
        return None
    capability, name, has = _limits(k.device.index)
    return refusal_for(capability, name, has, k.dtype, k.shape[-1], v.shape[-1])


def refusal_for(capability: int, name: str, has: int, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """The same for a GPU of this major compute capability, whose blocks may have `has` bytes."""
    if capability in (10, 11):
        return (f"{name} has compute capability {capability}.x, and Triton 3.7.1 does not compile the kernels of "
                "layers for 10.0")
    row = "8.0" if capability == 8 and has >= SMALL else {8: "8.6", 9: "9.0"}.get(capability, "12.0")
    needed = NEEDED[row].get((dtype in (torch.float16, torch.bfloat16), max(64, key_dim, value_dim)), 0)
    if needed <= has:
        return None
    return (f"K = {key_dim} and V = {value_dim} in {str(dtype).removeprefix('torch.')} need {needed:,} bytes of shared "
            f"memory a block, {name} has {has:,}")


def has_small_blocks() -> bool:
    """Whether the current GPU takes the small rows of the launch tables."""
    has = block_bytes()
    return has is not None and has < SMALL


def block_bytes() -> int | None:
    """Bytes of shared memory that a block may have on the current GPU; None where none is in use."""
    return _limits(torch.cuda.current_device())[2] if torch.cuda.is_initialized() else None


@functools.cache
def _limits(index: int) -> tuple[int, str, int]:
    found = torch.cuda.get_device_properties(index)
    return found.major, found.name, found.shared_memory_per_block_optin
