"""Start-up of a rank: device, process groups, seeds; and shutdown."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from hola_kernels.backend import triton_problem
from hola_megatron.data.opening import Data
from hola_megatron.errors import DataError, RecipeError
from hola_megatron.parallel.cpu import adapt_to_cpu
from hola_megatron.parallel.groups import Layout, release_communicators
from hola_megatron.parallel.waiting import declare_megatron
from hola_megatron.recipe.checks import check_world, missing_packages
from hola_megatron.recipe.schema import Recipe
from hola_megatron.startup import roll_call
from hola_megatron.startup.identity import data_facts, run_facts
from hola_megatron.startup.world import World, read_world


def start(recipe: Recipe, command: Mapping[str, Any] | None = None) -> Layout:
    """Initialise the process group from torchrun's environment (or for one process) and Megatron's groups.

    command: command-line options, which must be equal on all ranks like the recipe. Raises RecipeError when the number
    of processes does not fit the recipe, a package is missing, or the ranks differ; LostError when ranks do not answer.
    """
    world = read_world()
    problems = [*check_world(recipe, world.size), *missing_packages(recipe)]
    if problems:
        raise RecipeError(problems)
    adapt_to_cpu()
    if recipe.parallel.context > 1:
        keep_float32()
    device = _pick_device()
    if recipe.train.cuda_graph:
        _check_graph_device(device)
    if not dist.is_initialized():
        _join(device, world, recipe, command or {})
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        virtual = recipe.parallel.virtual_pipeline
        experts = {} if recipe.model.moe.experts is None else {
            "expert_model_parallel_size": recipe.parallel.expert, "expert_tensor_parallel_size": 1}
        # on a stream of normal priority, context-parallel messages would wait until the overlapping kernels end
        priority = {"high_priority_stream_groups": ["cp"]} if device.type == "cuda" else {}
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=recipe.parallel.tensor,
            pipeline_model_parallel_size=recipe.parallel.pipeline,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            context_parallel_size=recipe.parallel.context, **experts, **priority,
            distributed_timeout_minutes=recipe.parallel.timeout_minutes)  # may be fractional
    declare_megatron()
    # a sequence-parallel embedding switches to another generator state, also for dropout 0; a CUDA graph allows that
    # only with this option
    in_graph = recipe.train.cuda_graph and device.type == "cuda"
    model_parallel_cuda_manual_seed(recipe.train.seed, use_cudagraphable_rng=in_graph, force_reset_rng=True)
    if dist.get_rank():
        logging.getLogger("hola_kernels").setLevel(logging.ERROR)  # rank 0 prints which kernels run
    return Layout(
        rank=dist.get_rank(), world=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(), tensor=recipe.parallel.tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(), pipeline=recipe.parallel.pipeline,
        data_rank=parallel_state.get_data_parallel_rank(), data=parallel_state.get_data_parallel_world_size(),
        device=device, context_rank=parallel_state.get_context_parallel_rank(), context=recipe.parallel.context)


def _check_graph_device(device: torch.device) -> None:
    problem = triton_problem("cuda") if device.type == "cuda" else "this process sees no GPU"
    if problem:
        raise RecipeError(f"train.cuda_graph: true needs our Triton kernels on a GPU ({problem}); set it to false")


def stop() -> None:
    """Leave the process groups; safe to call twice."""
    release_communicators()
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    roll_call.leave()


def keep_float32() -> None:
    """Disable TF32 products where the environment enables them, as some containers do.

    A state is multiplied by one map per context rank. In TF32 the diagonal of a map with slow decay is rounded, each
    time in the same direction.
    """
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
        if os.environ.get("RANK", "0") == "0":
            logging.getLogger(__name__).warning(
                "the environment sets float32 products to lower precision (%s; TORCH_ALLOW_TF32_CUBLAS_OVERRIDE?): "
                "disabled, since errors of states accumulate over context ranks", precision)


def _pick_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, count = read_world().local_rank, torch.cuda.device_count()
    if number >= count:
        raise RecipeError(f"LOCAL_RANK: {number}, and this process sees {count} GPUs; start as many ranks on a node as "
                          "it has GPUs")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _join(device: torch.device, world: World, recipe: Recipe, command: Mapping[str, Any]) -> None:
    if world.alone:  # plain `python -m`: one process, without a port
        roll_call.leave()
        store = dist.HashStore()
        dist.init_process_group(_backend(device), store=store, rank=0, world_size=1)
        return
    timeout = datetime.timedelta(minutes=recipe.parallel.timeout_minutes)
    roll = roll_call.join(world, timeout)
    facts = run_facts(recipe, world=world.size, device=device.type, command=command)
    roll.compare(roll_call.RUN, facts, RecipeError,
                 "start every rank with the same recipe, overrides, packages and code")
    dist.init_process_group(_backend(device), store=roll.store, rank=world.rank, world_size=world.size, timeout=timeout)


def compare_data(data: Data) -> None:
    """DataError on all ranks unless all read the same data: paths may differ, fingerprints may not."""
    roll = roll_call.current()
    if roll is None:
        return
    valid = {name: (dataset.path, dataset.fingerprint) for name, dataset in data.valid.items()}
    facts = data_facts([(dataset.path, dataset.fingerprint) for dataset in data.mixture.datasets], valid,
                       data.tokenizer.identity())
    roll.compare(roll_call.DATA, facts, DataError,
                 "give every rank the same prepared data and tokenizer (paths may differ, fingerprints may not)")


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
