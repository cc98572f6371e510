"""Speeds measured on H200s, and the predictions of `speed.py`.

`python tools/plan.py --measured` prints the table of docs/plan.md. The rates of speed.py were fitted to the
rows of hola layers, so those show how well one set of rates describes them; the rows of commits 1be30c6 and a229e41
were measured later. The rate of ham's exact read and the launching of ham and cosine layers were fitted to their rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hola_megatron.model.flops import flops_per_token
from hola_megatron.plan.speed import H200_PEAK, estimate_speed
from hola_megatron.recipe.loading import load_recipe
from hola_megatron.recipe.schema import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
ALLOWED = 0.10


@dataclass(frozen=True)
class Run:
    """One measured run: recipe, overrides, GPUs, micro-batches a step, tokens a second of all GPUs, commit."""

    recipe: str
    overrides: str
    gpus: int
    micro_batches: int
    tokens_per_second: float
    commit: str

    def load(self) -> Recipe:
        """The recipe with so many micro-batches a step."""
        words = [("" if word.startswith(("fp8.", "model.")) else "parallel." if word.split("=")[0] in PARALLEL
                  else "train.") + word for word in self.overrides.split()]
        recipe = load_recipe(RECIPES / f"{self.recipe}.yaml", words)
        size = self.micro_batches * recipe.train.micro_batch_size * recipe.data_ranks(self.gpus)
        return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, global_batch_size=size))

    @property
    def predicted(self) -> float:
        return estimate_speed(self.load(), self.gpus, H200_PEAK).tokens_per_second


PARALLEL = ("tensor", "sequence", "context", "expert")
WHOLE = "tensor=1 sequence=false"
TWO = "tensor=2 sequence=true"
FOUR = "tensor=4 sequence=true"
GRAPH = "cuda_graph=true"
RUNS = [
    Run("hola_340m", "micro_batch_size=32", 1, 4, 169.5e3, "b0eab30"),
    Run("hola_340m", "micro_batch_size=32", 2, 4, 333.9e3, "b0eab30"),
    Run("hola_340m", "micro_batch_size=32", 4, 4, 668.2e3, "b0eab30"),
    Run("hola_340m", "micro_batch_size=32", 1, 1, 163.4e3, "ab9b7b9"),
    Run("hola_340m", f"micro_batch_size=32 {TWO}", 2, 4, 242.4e3, "b0eab30"),
    Run("hola_340m", "micro_batch_size=16", 1, 8, 154e3, "27741bb"),
    Run("hola_340m", f"micro_batch_size=16 {GRAPH}", 1, 8, 162e3, "27741bb"),
    Run("hola_340m", "micro_batch_size=1", 1, 8, 10.2e3, "27741bb"),
    Run("hola_340m", f"micro_batch_size=1 {GRAPH}", 1, 8, 64.4e3, "27741bb"),
    Run("hola_340m", "micro_batch_size=1 sequence_length=65536", 1, 1, 154.9e3, "b0eab30"),
    Run("hola_340m", "micro_batch_size=1 sequence_length=262144 context=4", 4, 1, 559.2e3, "b0eab30"),
    Run("hola_340m", "micro_batch_size=1 sequence_length=65536 context=4", 4, 1, 237.6e3, "244e47f"),
    Run("hola_340m", "micro_batch_size=1 sequence_length=1048576 context=4 recompute=full", 4, 1, 450.8e3, "244e47f"),
    Run("hola_340m", "micro_batch_size=32", 1, 2, 166.7e3, "1be30c6"),
    Run("hola_340m", "micro_batch_size=32 model.cache.score=recency", 1, 2, 163.7e3, "1be30c6"),
    Run("hola_340m", "micro_batch_size=32 model.cache.slots=0", 1, 2, 168.4e3, "1be30c6"),
    Run("hola_window_340m", "micro_batch_size=32", 1, 2, 157.9e3, "1be30c6"),
    Run("gdn_swa_340m", "micro_batch_size=32", 1, 2, 159.8e3, "1be30c6"),
    Run("gdn_340m", "micro_batch_size=16", 1, 4, 181.5e3, "a229e41"),
    Run("deltaproduct_340m", "micro_batch_size=16", 1, 4, 137.3e3, "a229e41"),
    Run("transformer_340m", "micro_batch_size=32", 1, 2, 181.3e3, "1be30c6"),
    Run("transformer_340m_gqa", "micro_batch_size=32", 1, 2, 182.3e3, "1be30c6"),
    Run("gdn_340m", "micro_batch_size=32", 1, 2, 184.6e3, "31faf99"),
    Run("hola_340m", "micro_batch_size=16 model.cache.score=cosine", 1, 4, 121.2e3, "31faf99"),
    Run("hqlt_sync_340m", "micro_batch_size=32", 1, 2, 164.8e3, "31faf99"),
    Run("ham_340m_share10", "micro_batch_size=16", 1, 4, 103.3e3, "31faf99"),
    Run("ham_340m_share10", "micro_batch_size=32", 1, 2, 145.3e3, "31faf99"),
    Run("ham_340m_share50", "micro_batch_size=32", 1, 2, 131.7e3, "31faf99"),
    Run("ham_340m_share10", "micro_batch_size=4 sequence_length=16384", 1, 2, 117.2e3, "31faf99"),
    Run("ham_340m_share50", "micro_batch_size=4 sequence_length=16384", 1, 2, 62.8e3, "31faf99"),
    Run("hola_1b", "", 1, 8, 54.7e3, "b0eab30"),
    Run("hola_1b", "", 2, 8, 108.1e3, "b0eab30"),
    Run("hola_1b", "", 4, 8, 216.3e3, "b0eab30"),
    Run("hola_1b", "", 1, 2, 50.2e3, "244e47f"),
    Run("hola_1b", "fp8.recipe=current", 1, 2, 61.6e3, "244e47f"),
    Run("hola_1b", "fp8.recipe=delayed", 1, 2, 63.5e3, "244e47f"),
    Run("hola_1b", "fp8.recipe=blockwise", 1, 2, 57.5e3, "244e47f"),
    Run("hola_1b", TWO, 2, 8, 84.5e3, "b0eab30"),
    Run("hola_1b", f"micro_batch_size=2 {TWO}", 2, 4, 35.7e3, "a85099f"),
    Run("hola_1b", f"micro_batch_size=2 {TWO} {GRAPH}", 2, 4, 70.0e3, "a85099f"),
    Run("hola_3b", f"micro_batch_size=1 {WHOLE}", 1, 8, 24.2e3, "b0eab30"),
    Run("hola_3b", "", 4, 4, 55.4e3, "e5565bc"),
    Run("hola_3b", GRAPH, 2, 4, 40.7e3, "ef5ea19"),
    Run("hola_3b", GRAPH, 4, 4, 85.1e3, "e5565bc"),
    Run("hola_7b", FOUR, 4, 2, 15.1e3, "b0eab30"),
    Run("hola_7b", f"{FOUR} {GRAPH}", 4, 4, 29.7e3, "e5565bc"),
    Run("hola_7b", f"{TWO} {GRAPH}", 4, 4, 36.6e3, "e5565bc"),
    Run("hola_7b", "", 4, 4, 42.4e3, "e5565bc"),
    Run("hola_moe_7b_a1b", "expert=4", 4, 2, 132.5e3, "b0eab30"),
]


def measured_table() -> str:
    """Markdown: every run, measured and predicted; what is off by more than a tenth is marked."""
    rows = [["recipe", "overrides", "GPUs", "micro-batches a step", "measured ktok/s", "MFU", "predicted", "off",
             "commit"], ["---"] * 9]
    for run in RUNS:
        recipe, predicted = run.load(), run.predicted
        mfu = run.tokens_per_second * flops_per_token(recipe.model, recipe.train.sequence_length) \
            / (H200_PEAK * run.gpus)
        off = predicted / run.tokens_per_second - 1
        rows.append([run.recipe, f"`{run.overrides}`" if run.overrides else "", f"{run.gpus}", f"{run.micro_batches}",
                     f"{run.tokens_per_second / 1e3:.1f}", f"{100 * mfu:.1f} %", f"{predicted / 1e3:.1f}",
                     f"{100 * off:+.0f} %" + (" (!)" if abs(off) > ALLOWED else ""), run.commit])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
