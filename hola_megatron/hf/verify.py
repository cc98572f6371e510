"""Verification of a conversion: the logits of the Megatron model and of the reloaded Hugging Face model are equal.

Both run in float32 on the plain torch operations, in one process, on random tokens that fill
more than two blocks of the exact cache; the last of them also go one by one through the
cache of the Hugging Face model. A bf16 export is compared with the Megatron model
holding the same rounded weights, so that the tolerance need not hide rounding.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hola_megatron.checkpoint.folder import Checkpoint
from hola_megatron.checkpoint.tensors import LAYER_STATE, TensorReader
from hola_megatron.engine.layer_states import LayerStates
from hola_megatron.errors import CheckpointError
from hola_megatron.hf import auto
from hola_megatron.hf.shape import differences, model_section
from hola_megatron.model.build import build_model
from hola_megatron.model.parameters import param_shards
from hola_megatron.recipe.loading import build_recipe
from hola_megatron.recipe.schema import Fp8Config, ParallelConfig, Recipe
from hola_megatron.startup.start import start, stop

TOLERANCE = 1e-5  # times the largest logit where that is above 1
NOISE = 100  # float32 differences up to this many times the tolerance are tried again in float64
ROWS, STEPS = 2, 24


@dataclass(frozen=True)
class Agreement:
    """Differences of two models' logits on the same tokens.

    worst, mean: of the absolute difference; limit: the largest one allowed; decoded: the largest one where
    the Hugging Face model went token by token through its cache; same_greedy: positions at which
    both choose the same token (or their choices are tied within `limit`).
    """

    tokens: int
    worst: float
    mean: float
    limit: float
    decoded: float
    same_greedy: int

    @property
    def passed(self) -> bool:
        # written so that a NaN fails
        return self.worst <= self.limit and self.decoded <= self.limit and self.same_greedy == self.tokens

    def __str__(self) -> str:
        return (f"logits of {self.tokens:,} tokens | max difference {self.worst:.2e}, decoded by the cache "
                f"{self.decoded:.2e} (allowed {self.limit:.1e}) | mean {self.mean:.2e} | greedy tokens equal "
                f"{self.same_greedy:,} of {self.tokens:,}")


def verify(checkpoint: Checkpoint, folder: Path) -> Agreement:
    """Compare a checkpoint with an exported folder. Raises CheckpointError where their logits differ."""
    recipe = build_recipe(checkpoint.run_manifest()["recipe"], stored=True)
    config = auto.read_config(folder)
    if problems := differences(asdict(recipe.model), model_section(config)):
        raise CheckpointError(f"{folder}: is a model of another recipe than {checkpoint.path}: {problems[0]}")
    tokens = _random_tokens(recipe)
    found = _compare_in(torch.float32, recipe, checkpoint, folder, tokens)
    if not found.passed and found.worst < NOISE * found.limit:
        print("float32 rounding may have grown through the layers; again in float64", flush=True)
        found = _compare_in(torch.float64, recipe, checkpoint, folder, tokens)
    if not found.passed:
        raise CheckpointError(f"{checkpoint.path}: the Hugging Face model does not give its logits (max difference "
                              f"{max(found.worst, found.decoded):.2e}, allowed {found.limit:.1e}, greedy tokens equal "
                              f"{found.same_greedy} of {found.tokens}); the conversion must not be used")
    return found


def _compare_in(dtype: torch.dtype, recipe: Recipe, checkpoint: Checkpoint, folder: Path, tokens: Tensor) -> Agreement:
    # one model after the other: only one is in memory
    theirs, decoded = _hf_logits(folder, tokens, dtype)
    mine = _megatron_logits(recipe, checkpoint, tokens, auto.read_config(folder).dtype or torch.float32, dtype)
    found = compare(mine, theirs, decoded)
    print(f"{found}\ngreedy tokens at the end | {mine[0, -STEPS:].argmax(-1).tolist()}", flush=True)
    return found


def compare(mine: Tensor, theirs: Tensor, decoded: Tensor) -> Agreement:
    """Two models' logits [B, T, vocabulary]; `decoded` the second's once more for the last tokens, by its cache."""
    apart, last = (mine - theirs).abs(), (mine[:, -decoded.shape[1]:] - decoded).abs()
    limit = TOLERANCE * max(1.0, float(mine.abs().max()))
    chosen = mine.gather(-1, theirs.argmax(-1, keepdim=True))[..., 0]
    same = int((chosen >= mine.max(-1).values - 2 * limit).sum())
    return Agreement(mine[..., 0].numel(), float(apart.max()), float(apart.mean()), limit, float(last.max()), same)


def _random_tokens(recipe: Recipe) -> Tensor:
    """[ROWS, T] with T enough for every part of every layer."""
    length = max(kind.comparison_length(recipe.model) for kind in recipe.model.layer_kinds)
    return torch.randint(recipe.model.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _hf_logits(folder: Path, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of all tokens in one call, and of the last ones token by token through the cache."""
    model = auto.load_model(folder, dtype=torch.float32, device=_device(), backend="torch").to(dtype)
    tokens = tokens.to(_device())
    logits = model(tokens, use_cache=False).logits.cpu()
    cache, steps = model(tokens[:, :-STEPS], use_cache=True, logits_to_keep=1).past_key_values, []
    for t in range(tokens.shape[1] - STEPS, tokens.shape[1]):
        steps.append(model(tokens[:, t: t + 1], past_key_values=cache).logits.cpu())
    return logits, torch.cat(steps, 1)


@torch.no_grad()
def _megatron_logits(recipe: Recipe, checkpoint: Checkpoint, tokens: Tensor, stored_as: torch.dtype,
                     dtype: torch.dtype) -> Tensor:
    """Logits of the checkpoint's weights, rounded as the export stores them, computed in `dtype`."""
    alone = _alone(recipe)
    layout = start(alone)
    try:
        model = build_model(alone, device=layout.device, seeded=False)[0].eval()
        reader = TensorReader(checkpoint.path, checkpoint.manifest["tensors"]["weight"])
        for shard in param_shards([model], 0, 1):
            shard.of(shard.parameter.data).copy_(auto.stored(shard.name, reader.whole(shard.name), stored_as))
        states = TensorReader(checkpoint.path, checkpoint.manifest["tensors"].get(LAYER_STATE, {}))
        LayerStates([model]).restore({name: states.whole(name) for name in states.names()})
        return model.to(dtype)(tokens.to(layout.device), None, None).cpu()
    finally:
        stop()


def _alone(recipe: Recipe) -> Recipe:
    """The recipe on one process, in float32 without fp8, on the torch operations and Megatron's own linear layers."""
    return dataclasses.replace(
        recipe, parallel=ParallelConfig(), fp8=Fp8Config(),
        train=dataclasses.replace(recipe.train, precision="fp32", recompute="none", cuda_graph=False,
                                  cuda_graph_documents=None),
        model=dataclasses.replace(recipe.model, backend="torch", layer_spec="local"))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
