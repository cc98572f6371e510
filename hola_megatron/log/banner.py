"""The start banner: derived sizes and counts, and the implementations in use with the reason."""

from __future__ import annotations

import sys

import torch

from hola_kernels.backend import auto_backend
from hola_megatron.checkpoint.save_load import TrainerState
from hola_megatron.data.order import CYCLE
from hola_megatron.data.recut import RecutDataset
from hola_megatron.data.shards import superseded_line
from hola_megatron.data.stream import Mixture
from hola_megatron.engine.base import Engine
from hola_megatron.layers.registry import distinct
from hola_megatron.layers.spec import LayerKind
from hola_megatron.log.console import code_version, device_name, short
from hola_megatron.model.config import choose_spec
from hola_megatron.model.flops import flops_per_token, matmul_parameters, peak_flops
from hola_megatron.parallel.groups import Layout
from hola_megatron.plan.parameters import parameters_by_part
from hola_megatron.recipe.schedule import describe_batches, describe_schedule
from hola_megatron.recipe.schema import Recipe


def print_banner(recipe: Recipe, layout: Layout, engine: Engine, mixture: Mixture,
                 state: TrainerState) -> None:
    """Print the banner, on one rank."""
    train, model = recipe.train, recipe.model
    flops = flops_per_token(model, train.sequence_length)
    peak = peak_flops(device_name(layout.device), recipe.log.peak_tflops)
    kernels, why = (model.backend, "named by the recipe") if model.backend != "auto" else \
        auto_backend(layout.device.type)
    spec, spec_why = choose_spec(model)
    # samples read so far plus those of the remaining steps: the batch size may have changed
    samples = state.samples + recipe.samples_before(train.steps) - recipe.samples_before(state.step)
    tokens = mixture.tokens(samples)
    data_size = sum(dataset.info["tokens"] for dataset in mixture.datasets)
    stale = sorted({folder for dataset in mixture.datasets for folder in dataset.superseded})
    counts = parameters_by_part(model)
    begin = f"resuming at step {state.step:,} ({short(mixture.tokens(state.samples))} tokens)" if state.step \
        else "new run"
    lines = {
        "run": f"{recipe.folder}  ({begin})",
        "recipe": f"{recipe.folder / 'recipe.yaml'} has every field; seed {train.seed}",
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
                 f"({_epochs(mixture, samples)})",
        "rate": describe_schedule(train),
        **({"batches": batches} if (batches := describe_batches(train)) else {}),
        "data": f"{', '.join(d.path for d in mixture.datasets)}: {short(data_size)} tokens, fingerprint "
                f"{mixture.fingerprint[:12]}, documents {recipe.data.documents}{_recut(mixture)}",
        **({"cache": "; ".join(map(superseded_line, stale))} if stale else {}),
        **_phase_lines(mixture, state),
        "kernels": f"{kernels} ({why})" + _torch_layers(recipe, kernels),
        "layers": f"{spec} ({spec_why}); {_products(recipe)}; optimizer {engine.adam}",
        **({"graph": graph} if (graph := engine.describe_graph()) else {}),
        "device": f"{device_name(layout.device)}, " + (
            f"peak {peak / 1e12:.0f} TFLOP/s" if peak else "no peak known: MFU is not shown (log.peak_tflops sets it)"),
    }
    print("\n".join(f"{name:>8}  {text}" for name, text in lines.items()), flush=True)


def _epochs(mixture: Mixture, samples: int) -> str:
    """Epochs of each stream at the end of the run: 0.42 epochs; or epochs: web 0.03, books 5.10."""
    epochs = mixture.epochs_per_stream(samples)
    if len(epochs) == 1:
        return f"{epochs[0]:.2f} epochs"
    return "epochs: " + ", ".join(f"{name} {n:.2f}" for name, n in zip(mixture.names, epochs, strict=True))


def _recut(mixture: Mixture) -> str:
    """Which datasets are read in samples of another length than they were prepared with."""
    lengths = sorted({d.stored_length for d in mixture.datasets if isinstance(d, RecutDataset)})
    if not lengths:
        return ""
    return f"; samples of {' and '.join(f'{n:,}' for n in lengths)} tokens are cut anew to {mixture.sequence_length:,}"


def _phase_lines(mixture: Mixture, state: TrainerState) -> dict[str, str]:
    """The streams of the mixture, and every phase that is planned or that a changed mixture has begun."""
    phases = mixture.phases.phases
    lines = {}
    if len(phases[-1].streams) > 1:
        lines["streams"] = ", ".join(f"{s.name} {s.share / CYCLE:.1%}" for s in phases[-1].streams)
    length = mixture.sequence_length
    for number, phase in enumerate(phases, 1):
        if phase.exact and (end := phase.first_sample + phase.samples) > state.samples:
            streams = ", ".join(f"{s.name} {s.share * length:,}" for s in phase.streams)
            lines[f"phase {number}"] = f"from sample {phase.first_sample:,} to {end:,}, tokens: {streams}"
    if phases[-1].first_sample:
        streams = ", ".join(f"{s.name} {s.share / CYCLE:.1%} (on from its sample {s.first:,})"
                            for s in phases[-1].streams)
        lines["mixture"] = f"phase {len(phases)}, from sample {phases[-1].first_sample:,} of the run: {streams}"
    return lines


def _torch_layers(recipe: Recipe, kernels: str) -> str:
    """Layers whose shape the Triton kernels do not support, which "auto" partly runs on torch."""
    if kernels != "triton":
        return ""
    problems = {kind.kernel_problem(recipe.model): None for kind in distinct(recipe.model.layer_kinds)}
    return "".join(f"; in part by torch: {problem}" for problem in problems if problem)


def _products(recipe: Recipe) -> str:
    """Precision of the layers' matrix products."""
    fp8, layers = recipe.fp8, recipe.model.layers
    if fp8.recipe is None:
        return f"matrix products {recipe.train.precision}"
    first, last = fp8.first_layers_bf16, fp8.last_layers_bf16
    rest = f", bf16 in the first {first} and last {last} of {layers} layers" if first or last else ""
    return f"matrix products fp8 ({fp8.recipe} scaling{rest})"


def _runs(kinds: tuple[LayerKind, ...]) -> str:
    """HHHHA -> 4H A."""
    shown, at = [], 0
    while at < len(kinds):
        end = at
        while end < len(kinds) and kinds[end] == kinds[at]:
            end += 1
        shown.append(f"{end - at}{kinds[at].label}")
        at = end
    return " ".join(shown)
