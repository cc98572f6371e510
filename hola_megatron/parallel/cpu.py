"""The only place that adapts Megatron-core to a machine without CUDA.

Megatron-core does not support the CPU: it uses devices, streams and generators of the CUDA runtime even when every
tensor is on the CPU. Each function below replaces one such use, named in its docstring, and is applied only where
`torch.cuda.is_available()` is false. Written for megatron-core 0.19. All replacements are process-wide: entry points
call `adapt_to_cpu()` once, before they build Megatron modules.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable

import torch


@functools.cache
def adapt_to_cpu() -> list[str]:
    """Apply every adaptation, once; returns their names (empty on a machine with CUDA)."""
    if torch.cuda.is_available():
        return []
    adaptations = (generators, current_device, synchronize, tensor_cuda, factories, streams, tensor_type,
                   fused_optimizer, expert_splits, expert_router)
    for adapt in adaptations:
        adapt()
    return [adapt.__name__ for adapt in adaptations]


def generators() -> None:
    """tensor_parallel.random keeps CUDA generator states for dropout and recompute: use the CPU generator's."""
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device="cpu": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cpu": torch.set_rng_state(state)
    import megatron.core.tensor_parallel.random as tracker

    tracker._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def current_device() -> None:
    """Buffers of DDP, pipeline messages and sequence-parallel gathers are made on torch.cuda.current_device()."""
    torch.cuda.current_device = lambda: torch.device("cpu")


def synchronize() -> None:
    """The pipeline synchronises after its messages."""
    torch.cuda.synchronize = lambda *args, **kwargs: None


def tensor_cuda() -> None:
    """Some functions move tensors by .cuda()."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def factories() -> None:
    """Literal device="cuda" and pin_memory=True in tensor factories (optimizer, clipping, schedules)."""

    def on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def wrapped(*args: object, **kwargs: object) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
            return make(*args, **kwargs)

        return wrapped

    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "randn", "rand"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def streams() -> None:
    """DDP uses the current stream and events on every device."""

    class NoStream:
        priority = 0

        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: None

        def query(self) -> bool:
            return True

        def record_event(self, event: object = None) -> object:
            return event or NoStream()

    one = NoStream()
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: one
    torch.cuda.Stream = torch.cuda.Event = NoStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda self, stream: None


def fused_optimizer() -> None:
    """Clipping and Adam use Transformer Engine's CUDA kernels where that package can be imported."""
    import megatron.core.optimizer as optimizers
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    optimizers.USING_PYTORCH_OPTIMIZER = True
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None


def expert_router() -> None:
    """The router uses Transformer Engine's matrix product where that package can be imported."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    moe_utils.te_general_gemm = None


def expert_splits() -> None:
    """all_to_all needs split sizes on the host; the token dispatcher copies them from CUDA tensors only."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    move = dispatcher.maybe_move_tensor_to_cpu

    def numbers(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
        if as_numpy and isinstance(tensor, torch.Tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return move(tensor, as_numpy=as_numpy, record_stream=record_stream)

    dispatcher.maybe_move_tensor_to_cpu = numbers


def tensor_type() -> None:
    """Optimizer and clipping compare parameter.type() with 'torch.cuda.FloatTensor'."""
    original = torch.Tensor.type

    def cuda_name(self: torch.Tensor, dtype: object = None, *args: object, **kwargs: object) -> object:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = cuda_name
