"""What a run says before its first step: every derived number, and what will run and why."""

from __future__ import annotations

import sys

import torch

from hola_kernels.backend import auto_backend
from hola_megatron.checkpoint.save_load import TrainerState
from hola_megatron.config import Recipe
from hola_megatron.data.stream import Mixture
from hola_megatron.engine.base import Engine
from hola_megatron.model.config import choose_spec
from hola_megatron.model.flops import flops_per_token, matmul_parameters, peak_flops
from hola_megatron.monitor.console import code_version, device_name, short
from hola_megatron.parallel.groups import Layout
from hola_megatron.plan.parameters import parameters_by_part
from hola_megatron.recipe_checks import KERNEL_WIDTHS


def print_banner(recipe: Recipe, layout: Layout, engine: Engine, mixture: Mixture,
                 state: TrainerState) -> None:
    """Print it; one rank calls this."""
    train, model = recipe.train, recipe.model
    flops = flops_per_token(model, train.sequence_length)
    peak = peak_flops(device_name(layout.device), recipe.log.peak_tflops)
    kernels, why = (model.backend, "named by the recipe") if model.backend != "auto" else \
        auto_backend(layout.device.type)
    spec, spec_why = choose_spec(model)
    tokens = train.steps * recipe.tokens_per_step
    data_size = sum(dataset.info["tokens"] for dataset in mixture.datasets)
    counts = parameters_by_part(model)
    begin = f"resuming at step {state.step:,} ({short(state.step * recipe.tokens_per_step)} tokens)" if state.step \
        else "new run"
    lines = {
        "run": f"{recipe.folder}  ({begin})",
        "recipe": f"{recipe.folder / 'recipe.yaml'} has every field; learning rate {train.learning_rate:g}, seed "
                  f"{train.seed}",
        "code": f"{code_version()}, torch {torch.__version__}, python {sys.version.split()[0]}",
        "model": f"{recipe.name}: {model.layers} layers {_runs(model.layer_kinds)}, width {model.hidden_size}; "
                 f"{short(matmul_parameters(model))} matmul parameters",
        "weights": f"{short(counts.pop('total'))} parameters: "
                   + ", ".join(f"{name.replace('_', ' ')} {short(n)}" for name, n in counts.items() if n),
        "flops": f"{flops / 1e9:.3g} GFLOP a token, {flops * tokens:.2e} in all",
        "layout": f"{layout.describe()}; {recipe.micro_batches(layout.world)} micro-batches of "
                  f"{train.micro_batch_size} x {train.sequence_length} tokens on each of {layout.data} data ranks"
                  + (f"; experts over {recipe.parallel.expert} ranks" if recipe.parallel.expert > 1 else ""),
        "steps": f"{train.steps:,} of {short(recipe.tokens_per_step)} tokens = {short(tokens)} "
                 f"({tokens / max(data_size, 1):.2f} epochs)",
        "data": f"{', '.join(d.path for d in mixture.datasets)}: {short(data_size)} tokens, fingerprint "
                f"{mixture.fingerprint[:12]}, documents {recipe.data.documents}",
        "kernels": f"{kernels} ({why})" + _state_elsewhere(recipe, kernels),
        "layers": f"{spec} ({spec_why}); {_products(recipe)}; optimizer {engine.adam}",
        **({"graph": graph} if (graph := engine.describe_graph()) else {}),
        "device": f"{device_name(layout.device)}, " + (
            f"peak {peak / 1e12:.0f} TFLOP/s" if peak else "no peak known: MFU is not shown (log.peak_tflops sets it)"),
    }
    print("\n".join(f"{name:>8}  {text}" for name, text in lines.items()), flush=True)


def _state_elsewhere(recipe: Recipe, kernels: str) -> str:
    """Widths that the state's Triton kernels do not take, which "auto" then gives to torch."""
    model = recipe.model
    odd = [width for width in (model.key_dim, model.value_dim) if width not in KERNEL_WIDTHS]
    if kernels != "triton" or not odd or not set(model.layer_kinds) & set("HG"):
        return ""
    return f"; the state by torch: heads of {odd[0]}, the kernels take {', '.join(map(str, KERNEL_WIDTHS))}"


def _products(recipe: Recipe) -> str:
    """What precision the layers' matrix products have."""
    fp8, layers = recipe.fp8, recipe.model.layers
    if fp8.recipe is None:
        return f"matrix products {recipe.train.precision}"
    first, last = fp8.first_layers_bf16, fp8.last_layers_bf16
    rest = f", bf16 in the first {first} and last {last} of {layers} layers" if first or last else ""
    return f"matrix products fp8 ({fp8.recipe} scaling{rest})"


def _runs(kinds: str) -> str:
    """HHHHA -> 4H A."""
    shown, at = [], 0
    while at < len(kinds):
        end = at
        while end < len(kinds) and kinds[end] == kinds[at]:
            end += 1
        shown.append(f"{end - at}{kinds[at]}")
        at = end
    return " ".join(shown)
