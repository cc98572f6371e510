"""Launch configurations of the Triton kernels: a small static table, every row checked on the GPU.

Nothing is tuned at run time, so the first call costs compilation only and no unchecked
configuration can run: Triton 3.4 to 3.7.0 miscompile some tile widths on Hopper in
silence. `python -m hola_kernels.verify` walks over the rows registered here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """tile: the free tile width of the kernel (its docstring says of what); warps and stages as Triton means them;
    registers: the most a thread may use, where fewer let more programs share a multiprocessor (None: no limit)."""

    tile: int
    warps: int
    stages: int
    registers: int | None = None


_table: dict[tuple, Launch] = {}


def register(kernel: str, rows: dict[tuple, Launch]) -> None:
    """Add the rows of one kernel; a row's key is what the kernel's launch depends on (dimensions, bits a number)."""
    for key, launch in rows.items():
        _table[(kernel, *key)] = launch


def launch_of(kernel: str, *key: int) -> Launch:
    return _table[(kernel, *key)]


def registered(kernel: str) -> dict[tuple, Launch]:
    """All rows of one kernel by key: what a sweep has to check."""
    return {key[1:]: launch for key, launch in _table.items() if key[0] == kernel}


# K, V, bytes a number -> launch. Values of K and V of the gated delta rule, and its tiles over V.
DIMENSIONS = (64, 128, 256)
for _k in DIMENSIONS:
    register("gated_delta_scan", {(_k,): Launch(32, 4 if _k < 256 else 8, 1)})
    for _bytes in (2, 4):
        register("gated_delta_prepare", {(_k, _bytes): Launch(64, 4, 2, 168 if _bytes == 2 else None)})
        for _v in DIMENSIONS:
            _walk = Launch(min(_v, 128), 8, 2) if _bytes == 2 and _v > 64 else Launch(64, 4, 1)
            for _name in ("forward", "states", "backward"):
                register(f"gated_delta_{_name}", {(_k, _v, _bytes): _walk})
            register("gated_delta_matrices", {(_k, _v, _bytes): Launch(64, 4, 1)})
            register("gated_delta_dq", {(_k, _v, _bytes): Launch(64, 8, 3) if _bytes == 2 else Launch(32, 8, 1)})
            register("gated_delta_dk", {(_k, _v, _bytes): Launch(64, 8, 2) if _bytes == 2 else Launch(32, 8, 1)})
