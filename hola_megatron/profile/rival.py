"""The training step of flash-linear-attention's Gated DeltaNet, of a recipe's shape, timed as ours is.

Their Hugging Face model with its fused options on (norms, SwiGLU, cross-entropy), torch's fused AdamW, the same random
tokens, one process, one GPU. weights "bf16": everything in bfloat16, the optimizer too; "fp32": float32 weights and
bfloat16 autocast. Their model has no exact cache: it does less than a HOLA recipe asks for.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hola_megatron.errors import RecipeError, UserError
from hola_megatron.layers.registry import distinct
from hola_megatron.recipe.schema import ModelConfig, Recipe

PACKAGES = {"fla": "flash-linear-attention==0.6.0", "transformers": "transformers"}


class RivalError(UserError):
    """The model to compare with cannot run here."""


def check_rival(recipe: Recipe) -> None:
    """Raises RivalError or RecipeError where `time_rival` could not start."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RivalError(f"comparison: {' and '.join(missing)} not installed; pip install {' '.join(missing)}, or "
                         "leave its sides out with --sides hola,gdn")
    rival_arguments(recipe.model)


def rival_arguments(model: ModelConfig) -> dict[str, Any]:
    """GatedDeltaNetConfig's arguments for the same shape. Raises RecipeError where theirs cannot have it."""
    problems = [problem for kind in distinct(model.layer_kinds) if (problem := kind.fla_problem(model))]
    if problems:
        raise RecipeError(problems)
    return {"hidden_size": model.hidden_size, "num_hidden_layers": model.layers, "num_heads": model.heads,
            "head_dim": model.key_dim, "expand_v": model.value_dim / model.key_dim, "conv_size": model.conv_width,
            "intermediate_size": model.mlp_hidden_size, "vocab_size": model.vocab_size, "norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings, "initializer_range": model.init_std, "use_cache": False,
            "allow_neg_eigval": model.beta_range == 2,
            "fuse_norm": True, "fuse_swiglu": True, "fuse_cross_entropy": True, "fuse_linear_cross_entropy": False}


def time_rival(recipe: Recipe, weights: str, *, steps: int, warmup: int, micro_batches: int) -> dict[str, Any]:
    """Numbers as tools/profile.py gives them, of their training step on this machine's one GPU."""
    import torch

    if not torch.cuda.is_available():
        raise RivalError("comparison: no CUDA device; their kernels run on a GPU only")
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    began = time.perf_counter()
    torch.manual_seed(recipe.train.seed)
    with torch.device("cuda"):
        lm = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**rival_arguments(recipe.model)))
    lm = lm.to(torch.bfloat16 if weights == "bf16" else torch.float32).train()
    parameters = sum(p.numel() for p in lm.parameters())
    step = _training_step(lm, recipe, weights, micro_batches)
    built = time.perf_counter() - began
    seconds = []
    for _ in range(warmup + steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[warmup:])
    train = recipe.train
    return {"parameters": parameters, "ms_per_step": 1e3 * median, "first_step_s": seconds[0], "build_s": built,
            "tokens_per_second": micro_batches * train.micro_batch_size * train.sequence_length / median,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9}


def _training_step(lm: Any, recipe: Recipe, weights: str, micro_batches: int) -> Callable[[], float]:
    import torch

    train = recipe.train
    parameters = list(lm.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=train.learning_rate, betas=(train.beta1, train.beta2),
                                  eps=train.adam_eps, weight_decay=train.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, recipe.model.vocab_size, (train.micro_batch_size, train.sequence_length),
                             generator=generator) for _ in range(micro_batches)]

    def step() -> float:
        total = 0.0
        for tokens in batches:
            on_device = tokens.to("cuda", non_blocking=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=weights == "fp32"):
                loss = lm(input_ids=on_device, labels=on_device).loss / micro_batches
            loss.backward()
            total = total + loss.detach()
        if train.clip_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, train.clip_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step


def compiled_before() -> str:
    """The content of Triton's cache of compiled kernels: a first step after "nothing" is a user's first step."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    count = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
    return f"{count} kernels" if count else "nothing"


def versions() -> dict[str, str]:
    """Of what decides the speed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "flash-linear-attention", "transformers", "transformer-engine", "megatron-core"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
