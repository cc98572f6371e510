"""One rank of the training tests of context parallelism: `main` runs every layout once and stores what came out."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import write_recipe

# three steps: gradients, what an update made of them, and what the optimizer remembers of them
FP32 = {"train__global_batch_size": 2, "train__micro_batch_size": 1, "train__steps": 3,
        "parallel": {"distributed_optimizer": False}}
JOINED = FP32 | {"data__documents": "joined", "train__micro_batch_size": 2, "train__global_batch_size": 4}
BF16 = FP32 | {"train__global_batch_size": 4, "train__precision": "bf16", "train__recompute": "full", "train__steps": 6}
# by world size; what is on one rank is what the others are compared with
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"packed": FP32, "joined": JOINED, "bf16": BF16},
    4: {
        "packed/cp2_tp2_sp": FP32 | {"parallel": {"context": 2, "tensor": 2, "sequence": True}},
        "packed/cp2_pp2": FP32 | {"parallel": {"context": 2, "pipeline": 2}},
        "packed/cp2_dp2": FP32 | {"parallel": {"context": 2}},
        "packed/cp4_recompute": FP32 | {"parallel": {"context": 4}, "train__recompute": "full"},
        "joined/cp2_dp2": JOINED | {"parallel": {"context": 2}},
        "bf16/cp2_pp2": BF16 | {"parallel": {"context": 2, "pipeline": 2}},
    },
}
# through the whole training program: validation, memory health, sample text, checkpoint
PROGRAM = FP32 | {"train__steps": 2, "valid": {"every": 2, "samples": 9}, "log__sample_every": 2,
                  "log__sample_tokens": 3, "log__sample_prompt": "A long prompt: what is behind the first rank's part"}


def run_layout(recipe: Any) -> dict[str, Any]:
    """Losses, gradient norms and token counts of the steps, and this rank's slices of every parameter."""
    from megatron.core import parallel_state

    from hola_megatron.data.stream import BatchLoader, Mixture, PackedDataset
    from hola_megatron.engine.megatron import MegatronEngine
    from hola_megatron.parallel.groups import start

    layout = start(recipe)
    engine = MegatronEngine(recipe, layout)
    mixture = Mixture([PackedDataset(recipe.data.train)], seed=recipe.train.seed)
    loader = BatchLoader(mixture, data_rank=layout.data_rank, data_size=layout.data,
                         micro_batch_size=recipe.train.micro_batch_size,
                         micro_batches=recipe.micro_batches(layout.world), documents=recipe.data.documents)
    rows = []
    for step in range(recipe.train.steps):
        result = engine.train_step(next(loader), recipe.train.learning_rate * (0.5 if step == 0 else 1))
        rows.append((result.loss, result.grad_norm, result.tokens))
    total, tokens = engine.evaluate([loader.micro_batch(0, 0)])
    logits = engine.next_logits(torch.arange(10, 10 + 50)).float()
    # after a forward pass: with overlap it is the one that gathers the updated parameters
    slices = [(p.name, p.shape, p.axis, p.offset, p.of(p.parameter.detach()).float().clone())
              for p in engine.parameter_pieces()]
    parallel_state.destroy_model_parallel()
    return {"rows": rows, "slices": slices, "evaluated": (total, tokens), "logits": logits}


def run_program(recipe: Any) -> None:
    from megatron.core import parallel_state

    from hola_megatron.trainer import train

    train(recipe)
    parallel_state.destroy_model_parallel()


def main(rank: int, ranks: int, folder: Path, data: Path) -> None:
    from hola_megatron.config import load_recipe
    from hola_megatron.parallel.cpu import adapt_to_cpu

    adapt_to_cpu()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    mine = folder / f"recipes{ranks}_{rank}"
    mine.mkdir()
    results = {}
    for name, changes in LAYOUTS[ranks].items():
        path = write_recipe(mine / "recipe.yaml", data / "train", **json.loads(json.dumps(changes)))
        results[name] = run_layout(load_recipe(path))
    torch.save(results, folder / f"layouts{ranks}_{rank}.pt")
    parallel = {"context": 2, "tensor": 2} if ranks > 1 else {}
    path = write_recipe(mine / "recipe.yaml", data / "train", **PROGRAM | {"parallel": parallel},
                        run_dir=str(folder / f"run{ranks}"), data__valid=str(data / "valid"))
    run_program(load_recipe(path))
    dist.barrier()
    dist.destroy_process_group()
