"""Launch configurations of the Triton kernels: a small static table, every row checked on the GPU.

Nothing is tuned at run time, so the first call costs compilation only and no unchecked
configuration can run: Triton 3.4 to 3.7.0 miscompile some tile widths on Hopper in
silence. `python -m hola_kernels.verify` runs every row on the GPU at hand; a new row is checked there, on
the oldest and the newest Triton supported, before it is entered.
"""

from __future__ import annotations

from dataclasses import dataclass

from hola_kernels.shared_memory import has_small_blocks


@dataclass(frozen=True)
class Launch:
    """tile: the free tile width of the kernel (its docstring says of what); warps and stages as Triton means them;
    registers: the most a thread may use, where fewer let more programs share a multiprocessor (None: no limit)."""

    tile: int
    warps: int
    stages: int
    registers: int | None = None


_table: dict[tuple, Launch] = {}
_small: dict[tuple, Launch] = {}  # rows of GPUs with little shared memory, where they differ


def register(kernel: str, rows: dict[tuple, Launch], small: bool = False) -> None:
    """Add the rows of one kernel; a row's key is what the kernel's launch depends on (dimensions, bits a number)."""
    for key, launch in rows.items():
        (_small if small else _table)[(kernel, *key)] = launch


def launch_of(kernel: str, *key: int) -> Launch:
    """The row for the current GPU."""
    row = (kernel, *key)
    return _small.get(row, _table[row]) if has_small_blocks() else _table[row]


# The gated delta rule by (K, V, bytes a number). Timed on an H200 at K = V = 128 and 256 in 16 bits; the others follow.
# The tiles of fp32 are those whose shared memory fits, not the fastest.
DIMENSIONS = (64, 128, 256)
for _k in DIMENSIONS:
    _split_keys = _k > 128
    register("gated_delta_scan", {(_k,): Launch(16, 8 if _k > 64 else 4, 3)})
    register("gated_delta_prepare", {(_k, 2): Launch(64, 4, 3, 168), (_k, 4): Launch(64, 4, 2)})
    for _v in DIMENSIONS:
        if _v > 64:
            register("gated_delta_forward", {(_k, _v, 2): Launch(128, 8, 2 if _split_keys else 3)})
            register("gated_delta_states", {(_k, _v, 2): Launch(64, 4, 2) if _split_keys else Launch(128, 8, 2)})
            register("gated_delta_backward", {(_k, _v, 2): Launch(128, 8, 2 if _split_keys else 3)})
        for _name in ("forward", "states", "backward"):
            register(f"gated_delta_{_name}", {(_k, _v, 4): Launch(64, 4, 1)} | (
                {(_k, _v, 2): Launch(64, 4, 1)} if _v == 64 else {}))
        if _split_keys and _v == 64:
            # with one stage Triton 3.6 leaves rows of dr unwritten here, silently (verify: K=256 V=64 split)
            register("gated_delta_backward", {(_k, _v, 2): Launch(64, 4, 2)})
        register("gated_delta_matrices", {(_k, _v, 2): Launch(64, 4, 3), (_k, _v, 4): Launch(64, 4, 1)})
        register("gated_delta_dq", {(_k, _v, 2): Launch(64, 8, 3) if _split_keys else Launch(64, 4, 2, 168),
                                    (_k, _v, 4): Launch(32, 8, 1)})
        register("gated_delta_dk", {(_k, _v, 2): Launch(64, 8, 2) if _split_keys else Launch(64, 4, 2),
                                    (_k, _v, 4): Launch(32, 8, 1)})
        if _k > 64:
            # compiled for compute capability 8.6 and 12.0, not run there yet
            for _name in ("forward", "states", "backward"):
                register(f"gated_delta_{_name}", {(_k, _v, 2): Launch(64, 4, 1)}, small=True)


def keeps_states(key_dim: int, value_dim: int, size: int) -> bool:
    """Whether the state pass writes every chunk's state and residuals for the backward pass (K V / 32 + 2 V bytes a
    token and head), instead of recomputing them in the backward pass. 104 of 2,100 us less at K = V = 128; at 256,
    where its registers are full, 21 of 2,320, and 335 MB held for it. On an H200 in 16 bits, 32,768 tokens.
    """
    return size == 2 and max(key_dim, value_dim) <= 128
