"""What every public operation has around it: checked devices, no autocast, the GPU of its tensors, no tracing.

Autocast would run some products of an operation in 16 bits and others not: what is computed is the definition, in the
precision that the tensors' own dtype says. Triton launches on the current GPU, which need not be the tensors'
(`device_map` of transformers). Inside an operation tables are made on the host, and torch.compile cannot trace that:
the operation stays whole, between the compiled parts of the model.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hola_kernels.errors import KernelError

_untraced: dict[Callable[..., Any], Callable[..., Any]] = {}


def operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """A public operation of keyword arguments; its tensors must lie on one device, cu_seqlens wherever it likes."""

    @functools.wraps(function)
    def run(**arguments: Any) -> Any:
        return _body_of(within)(**arguments)

    needed = {name: "None" not in str(of.annotation) for name, of in inspect.signature(function).parameters.items()
              if name != "cu_seqlens" and str(of.annotation).startswith("Tensor")}

    def within(**arguments: Any) -> Any:
        check_tensors(arguments, needed)
        device = check_devices(arguments)
        with on_device(device), without_autocast(device):
            return function(**arguments)

    run._torchdynamo_disable = True  # torch.compile calls it, and does not look inside
    run._torchdynamo_disable_msg = "operations of hola_kernels are not traced"
    return run


def _body_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself; where torch's compiler is loaded, with the compiler off. Loading it takes seconds."""
    if "torch._dynamo" not in sys.modules:
        return function
    if function not in _untraced:
        _untraced[function] = torch.compiler.disable(function)
    return _untraced[function]


def check_tensors(arguments: dict[str, Any], needed: dict[str, bool]) -> None:
    """KernelError for an argument that is no tensor; needed: {name: whether None is refused as well}."""
    for name, must in needed.items():
        value = arguments.get(name)
        if isinstance(value, Tensor) or (value is None and not (must and name in arguments)):
            continue
        raise KernelError(f"{name} must be a tensor, not {'None' if value is None else type(value).__name__}")


def check_devices(arguments: dict[str, Any]) -> torch.device:
    """The device of all tensors among the arguments; KernelError naming the one that lies elsewhere."""
    first: tuple[str, torch.device] | None = None
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or name == "cu_seqlens":
            continue
        if first is None:
            first = name, value.device
        elif value.device != first[1]:
            raise KernelError(f"{name} is on {value.device} and {first[0]} on {first[1]}: they must be on one device")
        if value.layout != torch.strided:
            raise KernelError(f"{name} of layout {value.layout} must be a dense tensor (torch.strided)")
    return torch.device("cpu") if first is None else first[1]


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast on this kind of device."""
    if device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of an autograd function that cannot be differentiated again: a second derivative is an error.

    torch's once_differentiable says so only where the incoming gradient needs one itself; a second derivative through
    the saved inputs would be left out, silently. No autocast inside, as in the forward pass.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        device = next((x.device for x in gradients if x is not None), torch.device("cpu"))
        with torch.no_grad(), on_device(device), without_autocast(device):
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():  # no second derivative is wanted (create_graph)
            return found
        sources = [x for x in (*gradients, *ctx.saved_tensors) if x is not None and x.requires_grad]
        several = found if isinstance(found, tuple) else (found,)
        indices = [i for i, x in enumerate(several) if x is not None]
        if not sources or not indices:
            return found
        marked = _NoSecond.apply(len(indices), *(several[i] for i in indices), *sources)
        marked = dict(zip(indices, marked, strict=True))
        several = tuple(marked.get(i) for i in range(len(several)))
        return several if isinstance(found, tuple) else several[0]

    return run


class _NoSecond(torch.autograd.Function):
    """The first `count` tensors as they are, depending on all: an error where their gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("this operation of hola_kernels is once differentiable: its backward pass has no gradient "
                           "of its own; backend='torch' of the operation has")
