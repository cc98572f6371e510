"""One rank of the NCCL tests of context parallelism: runs the cases of one precision and stores what it got.

    python -m hola_megatron.launch --nproc-per-node 4 tests/gpu/context_nccl_ranks.py FOLDER fp32|bf16|bf16_keeps

The one-rank results, on the same kernels, are made here too, each on one of the GPUs: the test only compares.
Where the choice of cached tokens hangs on rounding (score betae), their gate is the paper's start, -4, so that one
token more or less changes little; where it does not (betav), the gates are random.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "distributed"), str(HERE.parent / "kernels")]

import torch
import torch.distributed as dist
from context_compare import memory_before, one_rank
from context_ranks import SHARED, Case, run_case

from hola_megatron.parallel.context import ContextParallel, hola_attention_over_ranks

LENGTH = 12_000  # parts are long enough to be split into spans, and cut cache blocks
LONG = (0, 17, 5_000, 5_001, 11_700, LENGTH)
SHORT = (0, 1, 255, 256, 700, 1_000, 1_001, 1_500, 2_500, 3_000, 3_999, 4_000)
# in 16 bits and up to 128 wide the state pass saves states for the backward pass
PRECISIONS = {"fp32": (torch.float32, 64), "bf16": (torch.bfloat16, 256), "bf16_keeps": (torch.bfloat16, 128)}


def cases(precision: str, world: int) -> dict[str, Case]:
    """Every case that so many ranks can run, by name."""
    dtype, width = PRECISIONS[precision]
    fixed = {"dtype": dtype, "key": width, "value": width, "backend": "triton", "device": "cuda", "spread": 1.5}
    given = {"options": {"block": 256, "slots": 64, "score": "betav"}, **fixed}
    paper = {"options": {"block": 256, "slots": 64}, "gate": -4.0, **fixed}
    made = {}
    for ranks in (n for n in (2, 4) if n <= world):
        made |= {f"cp{ranks}_plain": Case(ranks, LENGTH, **paper),
                 f"cp{ranks}_packed": Case(ranks, LENGTH, LONG, **paper),
                 f"cp{ranks}_plain_betav": Case(ranks, LENGTH, **given),
                 f"cp{ranks}_packed_betav": Case(ranks, LENGTH, LONG, **given),
                 f"cp{ranks}_short_documents": Case(ranks, 4_000, SHORT, **given),
                 f"cp{ranks}_rows": Case(ranks, 4_000, rows=2, **given),
                 f"cp{ranks}_gdn": Case(ranks, 4_000, SHORT, what="gdn", **fixed),
                 f"cp{ranks}_attention": Case(ranks, 4_000, SHORT, what="attention", **fixed | {"key": 64}),
                 f"cp{ranks}_conv": Case(ranks, 4_000, SHORT, what="conv", **fixed)}
    return made


def waits(case: Case, rank: int, group: dist.ProcessGroup) -> str | None:
    """What a layer's forward and backward pass waited for on the host, once its tables are made; None if nothing."""
    part = case.part(rank)
    local = {n: (x if n in SHARED else part.slice(x)).detach().clone().requires_grad_()
             for n, x in case.inputs().items()}
    weight = part.slice(case.projection).to(local["v"])

    def layer() -> None:
        o = hola_attention_over_ranks(**local, cp=ContextParallel(part, group), backend=case.backend,
                                      options=case.choices)
        torch.autograd.grad(o, list(local.values()), weight)

    layer()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def on_cpu(x: Any) -> Any:
    """Tensors anywhere in plain containers and dataclasses, moved to the CPU."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu()
    if isinstance(x, dict):
        return {name: on_cpu(value) for name, value in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(on_cpu(value) for value in x)
    if hasattr(x, "cache_position"):
        return x.map(lambda held: held.detach().cpu())
    return x


def together(case: Case, rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """This rank's share of a case; where there is a memory, also what one rank remembers at this point."""
    found = run_case(case, rank, group)
    return found | {"want_memory": memory_before(case, rank)} if "memory" in found else found


def store(folder: Path, name: str, make: Callable[[], Any]) -> None:
    """A file for every result, or for how it failed: one bad case hides no other."""
    try:
        result = on_cpu(make())
    except Exception:
        result = {"failed": traceback.format_exc()}
        print(name, result["failed"], flush=True)
    torch.save(result, folder / f"{name}.pt")


def main(folder: Path, precision: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    groups = {world: dist.group.WORLD}
    if world > 2:
        groups[2] = dist.new_group([0, 1])
    wanted = cases(precision, world)
    for number, (name, case) in enumerate(wanted.items()):
        if rank < case.ranks:
            store(folder, f"{precision}_{name}_{rank}", lambda case=case: together(case, rank, groups[case.ranks]))
        if number % world == rank:
            store(folder, f"{precision}_{name}_alone", lambda case=case: one_rank(case))
    packed = wanted[f"cp{world}_packed_betav"]
    store(folder, f"{precision}_waits_{rank}", lambda: waits(packed, rank, dist.group.WORLD))
    dist.barrier(device_ids=[torch.cuda.current_device()])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
