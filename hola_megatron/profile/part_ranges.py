"""Named ranges around modules and functions, so that a profiler trace shows the part of every kernel.

Kernel names do not show the part: the matrix products of projections, MLP and head have one name. So under a profiler
every module of a part, and every function that the layer kinds name (layers/*/timing.py), runs inside
`torch.profiler.record_function("part: ...")`. What a backward pass launches is found from the forward operation it
belongs to (part_times.py), or from a range of its own where one autograd function does the work of several parts.
Nothing here changes what is computed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.profiler import record_function

from hola_megatron.layers.registry import distinct
from hola_megatron.layers.spec import LayerKind

PREFIX = "part: "
STEP = PREFIX + "step"
REST = "rest"


@contextlib.contextmanager
def named_parts(engine: Any) -> Iterator[None]:
    """While open, everything that `engine.train_step` does happens inside a range named after its part."""
    with contextlib.ExitStack() as stack:
        for chunk in engine.model:
            for module, part in parts_of_chunk(chunk.module):
                stack.enter_context(_range_around(module, part))
            stack.enter_context(replaced(chunk, "zero_grad_buffer", _inside("optimizer")))
        for module, name, part in _functions(distinct(engine.recipe.model.layer_kinds)):
            stack.enter_context(replaced(module, name, _inside(part)))
        for name in ("zero_grad", "prepare_grads", "get_grad_norm"):
            stack.enter_context(replaced(engine.optimizer, name, _inside("optimizer")))
        stack.enter_context(replaced(engine, "_update", _inside("optimizer")))
        stack.enter_context(replaced(engine.config, "finalize_model_grads_func", _inside("optimizer")))
        yield


def parts_of_chunk(chunk: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, part) of a model chunk; a module inside another takes its work from the outer one's part."""
    yield chunk, "head and loss"  # whatever is neither embedding nor decoder
    if getattr(chunk, "embedding", None) is not None:
        yield chunk.embedding, "embedding"
    yield chunk.decoder, "norms and residuals"
    for layer in chunk.decoder.layers:
        mixer = layer.self_attention
        yield mixer, mixer.kind.time_part
        yield mixer.in_proj, "projections"
        yield mixer.out_proj, "projections"
        yield layer.mlp, "MLP"


@contextlib.contextmanager
def replaced(owner: Any, name: str, change: Callable[[Callable], Callable]) -> Iterator[None]:
    """While open, `owner.name` is change(what it was)."""
    own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, change(original))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def _functions(kinds: Iterable[LayerKind]) -> Iterator[tuple[Any, str, str]]:
    """(module, function, part) of all kinds, each once: two kinds may share a function."""
    for module, name, part in dict.fromkeys(found for kind in kinds for found in kind.timed_functions()):
        yield importlib.import_module(module), name, part


def _inside(part: str) -> Callable[[Callable], Callable]:
    def change(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(PREFIX + part):
                return function(*args, **kwargs)

        return run

    return change


@contextlib.contextmanager
def _range_around(module: nn.Module, part: str) -> Iterator[None]:
    ranges = []

    def enter(*_: Any) -> None:
        ranges.append(record_function(PREFIX + part))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
