"""python tests/gpu/measure_curves.py [steps]: losses of a small model on bundled text, bf16 beside every fp8 recipe.

Three seeds of bf16 are the noise that fp8 is held against. The last row is held-out text, in bf16 for all. One GPU,
Transformer Engine; on a CPU the bf16 columns alone.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip

import gc
import json
import lzma
import sys
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import hola_megatron.data
from hola_megatron.config import build_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.startup.start import start, stop

ROWS, LENGTH, HELD_OUT = 16, 1024, 65536
RECIPE = {
    "name": "curve",
    "model": {"layers": 12, "hidden_size": 512, "heads": 4, "key_dim": 128, "value_dim": 128, "mlp_hidden_size": 1408,
              "vocab_size": 264},
    "data": {"train": "unused", "tokenizer": "bytes"},
    "train": {"sequence_length": LENGTH, "global_batch_size": ROWS, "micro_batch_size": ROWS, "learning_rate": 1e-3,
              "precision": "bf16", "weight_decay": 0.1},
}
RUNS = {
    **{f"bf16 seed {seed}": {"train": {"seed": seed}} for seed in (1234, 2, 3)},
    **{name: {"fp8": {"recipe": name}} for name in ("delayed", "current", "blockwise")},
    "current, 1+1 bf16": {"fp8": {"recipe": "current", "first_layers_bf16": 1, "last_layers_bf16": 1}},
}


def batch(tokens: Tensor) -> Batch:
    cu_seqlens = torch.arange(0, ROWS * LENGTH + 1, LENGTH, dtype=torch.int32)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(len(tokens), LENGTH), cu_seqlens)


def curve(text: Tensor, steps: int, change: dict[str, dict[str, Any]]) -> tuple[list[float], float]:
    """(the loss of every step, that of held-out text), nats a byte."""
    from hola_megatron.engine.megatron import MegatronEngine

    values = json.loads(json.dumps(RECIPE))
    values["train"]["steps"] = steps
    for section, fields in change.items():
        values[section] = values.get(section, {}) | fields
    recipe = build_recipe(values)
    engine = MegatronEngine(recipe, start(recipe))
    generator, losses = torch.Generator().manual_seed(recipe.train.seed), []
    for step in range(steps):
        at = torch.randint(0, len(text) - HELD_OUT - LENGTH - 1, (ROWS,), generator=generator)
        rows = batch(torch.stack([text[i: i + LENGTH + 1] for i in at]))
        losses.append(engine.train_step([rows], 1e-3 * min(1.0, (step + 1) / 20)).loss)
    held_out = text[-HELD_OUT:][: ROWS * (LENGTH + 1) * 3].view(3, ROWS, LENGTH + 1)
    total, tokens = engine.evaluate([batch(rows) for rows in held_out])
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    return losses, total / tokens


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    packed = hola_megatron.data.__path__[0] + "/bundled/shakespeare.txt.xz"
    with lzma.open(packed) as file:
        text = torch.tensor(list(file.read()))
    found = {name: curve(text, steps, change) for name, change in RUNS.items()
             if "fp8" not in change or torch.cuda.is_available()}
    print(f"{'steps':>10} " + " ".join(f"{name:>18}" for name in found))
    for first in range(0, steps, 20):
        values = [mean(losses[first: first + 20]) for losses, _ in found.values()]
        print(f"{first + 1:>5}-{first + 20:<4} " + " ".join(f"{value:>18.4f}" for value in values))
    print(f"{'held out':>10} " + " ".join(f"{valid:>18.4f}" for _, valid in found.values()))
    stop()


if __name__ == "__main__":
    main()
