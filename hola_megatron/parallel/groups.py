"""Start-up of a rank: device, process groups, seeds. Everything else asks `Layout`."""

from __future__ import annotations

import datetime
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from hola_kernels.backend import triton_problem
from hola_megatron.config import Recipe
from hola_megatron.errors import RecipeError
from hola_megatron.parallel.cpu import adapt_to_cpu
from hola_megatron.recipe_checks import check_recipe, missing_packages


@dataclass(frozen=True)
class Layout:
    """Where this process stands."""

    rank: int
    world: int
    tensor_rank: int
    tensor: int
    pipeline_rank: int
    pipeline: int
    data_rank: int
    data: int
    device: torch.device
    context_rank: int = 0
    context: int = 1

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes metrics."""
        return self.rank == 0

    def describe(self) -> str:
        context = f" x context {self.context}" if self.context > 1 else ""
        return f"{self.world} ranks = tensor {self.tensor}{context} x pipeline {self.pipeline} x data {self.data}"


def start(recipe: Recipe) -> Layout:
    """Join the process group that torchrun describes (alone without it) and build Megatron's groups.

    Raises RecipeError when the number of processes does not fit the recipe, or a package it needs is missing.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    problems = check_recipe(recipe, world_size=world) + missing_packages(recipe)
    if problems:
        raise RecipeError(problems)
    adapt_to_cpu()
    if recipe.parallel.context > 1:
        keep_float32()
    device = _pick_device()
    if recipe.train.cuda_graph:
        _check_graph_device(device)
    if not dist.is_initialized():
        _join(device, world, recipe.parallel.timeout_minutes)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        virtual = recipe.parallel.virtual_pipeline
        experts = {} if recipe.model.moe.experts is None else {
            "expert_model_parallel_size": recipe.parallel.expert, "expert_tensor_parallel_size": 1}
        # a message of context parallelism that finds every multiprocessor taken would start when the work that is to
        # hide it ends
        priority = {"high_priority_stream_groups": ["cp"]} if device.type == "cuda" else {}
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=recipe.parallel.tensor,
            pipeline_model_parallel_size=recipe.parallel.pipeline,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            context_parallel_size=recipe.parallel.context, **experts, **priority,
            distributed_timeout_minutes=recipe.parallel.timeout_minutes)  # of a timedelta, so it need not be whole
    # a sequence-parallel embedding takes another generator's state for its dropout, for one of 0 too; a graph allows
    # that in this form only
    in_graph = recipe.train.cuda_graph and device.type == "cuda"
    model_parallel_cuda_manual_seed(recipe.train.seed, use_cudagraphable_rng=in_graph, force_reset_rng=True)
    if dist.get_rank():
        logging.getLogger("hola_kernels").setLevel(logging.ERROR)  # rank 0 says which kernels run
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


def agree(layout: Layout, *numbers: int) -> list[int]:
    """The largest of each number over all ranks, on all ranks. One small collective."""
    together = torch.tensor([int(number) for number in numbers], device=layout.device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return together.tolist()


def on_main(layout: Layout, action: Callable[[], Any]) -> Any:
    """The result of `action` on rank 0, on all ranks; or what it raised there, raised by all. A collective."""
    box: list[Any] = [None, None]
    if layout.is_main:
        try:
            box[0] = action()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


class HoldsCommunicators(Protocol):
    """Something that process groups cannot be left with."""

    def release(self) -> None: ...


_held: weakref.WeakSet[HoldsCommunicators] = weakref.WeakSet()


def release_at_stop(holder: HoldsCommunicators) -> None:
    """`stop` will call its `release` if it is still alive then."""
    _held.add(holder)


def stop() -> None:
    """Leave the process groups; safe to call twice."""
    for holder in list(_held):
        holder.release()
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def keep_float32() -> None:
    """Products of float32 stay float32 where the environment asks torch for less, as some containers do.

    A state that goes from rank to rank is multiplied by one map a rank. In tf32 the diagonal of a map that forgets
    next to nothing is rounded, every time the same way.
    """
    asked = torch.get_float32_matmul_precision()
    if asked != "highest":
        torch.set_float32_matmul_precision("highest")
        if os.environ.get("RANK", "0") == "0":
            logging.getLogger(__name__).warning(
                "torch is set to multiply float32 in less than float32 (%s; TORCH_ALLOW_TF32_CUBLAS_OVERRIDE?): not "
                "done here, it wears states down that go over many ranks", asked)


def _pick_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _join(device: torch.device, world: int, minutes: float) -> None:
    if "RANK" not in os.environ:  # plain `python -m`: a world of one, without a port to collide on
        store = dist.HashStore()
        dist.init_process_group(_backend(device), store=store, rank=0, world_size=1)
        return
    dist.init_process_group(_backend(device), timeout=datetime.timedelta(minutes=minutes))


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
