"""Which part of a step launched a piece of work: ranges of names around modules and functions, for a profiler trace.

Kernel names do not tell: the matrix products of projections, MLP and head have one name. So while a profiler looks,
every module of a part and every function below runs inside `torch.profiler.record_function("part: ...")`. What a
backward pass launches is found from the forward operation it belongs to (part_times.py), or from a range of its own
where one autograd function does the work of several parts. Nothing here changes what is computed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.profiler import record_function

from hola_megatron.model.mixer import AttentionMixer

PREFIX = "part: "
STEP = PREFIX + "step"
REST = "rest"

# (module, function in it, part): the references that callers look up when they run
FUNCTIONS = (
    ("hola_megatron.model.mixer", "short_conv", "convolution"),
    ("hola_megatron.model.mixer", "conv_tail", "convolution"),
    ("hola_megatron.model.mixer", "send_conv_tail", "convolution"),
    ("hola_megatron.model.mixer", "decay_and_strength", "gates and layout"),
    ("hola_megatron.model.mixer", "gated_delta_rule", "state"),
    ("hola_megatron.model.mixer", "gated_delta_over_ranks", "state"),
    ("hola_megatron.model.mixer", "start_state_exchange", "state"),
    ("hola_megatron.model.mixer", "gated_rms_norm", "output norm"),
    ("hola_megatron.parallel.context", "_state_pass", "state"),
    ("hola_megatron.parallel.context", "rank_tokens", "selection"),
    ("hola_megatron.parallel.context", "entering_memory", "selection"),
    ("hola_megatron.parallel.context", "exact_read_only", "read"),
    ("hola_megatron.parallel.context", "combine", "read"),
    ("hola_kernels.attention", "gated_delta_rule", "state"),
    ("hola_kernels.attention", "rank_tokens", "selection"),
    ("hola_kernels.attention", "exact_read", "read"),
    ("hola_kernels.attention", "combine", "read"),
    ("hola_kernels.exact_cache.torch_blocks", "select_tokens", "selection"),
)
# the same where Triton can be imported; its autograd functions do state, selection and read in one
TRITON_FUNCTIONS = (
    ("hola_kernels.triton_attention", "rule_forward", "state"),
    ("hola_kernels.triton_attention", "rule_backward", "state"),
    ("hola_kernels.triton_attention", "_rank", "selection"),
    ("hola_kernels.triton_attention", "select_slots", "selection"),
    ("hola_kernels.triton_attention", "launch_read_forward", "read"),
    ("hola_kernels.triton_attention", "exact_read_backward", "read"),
    ("hola_kernels.exact_cache.triton_read", "select_slots", "selection"),
    *(("hola_megatron.parallel.fused_layer", name, part) for part, names in (
        ("state", ("begin", "finish", "leaving_map", "asked", "walk_back", "gradients_of_chunks", "fold_left",
                   "fold_right", "maps_between")),
        ("selection", ("_rank", "best_rows", "select_slots", "merge", "send_shard")),
        ("read", ("launch_inverse_norms", "launch_read_own", "launch_read_rest", "exact_read_backward",
                  "_add_returned")),
    ) for name in names),
)


@contextlib.contextmanager
def named_parts(engine: Any) -> Iterator[None]:
    """While open, everything that `engine.train_step` does happens inside a range named after its part."""
    with contextlib.ExitStack() as stack:
        for chunk in engine.model:
            for module, part in parts_of_chunk(chunk.module):
                stack.enter_context(_range_around(module, part))
            stack.enter_context(replaced(chunk, "zero_grad_buffer", _inside("optimizer")))
        for module, name, part in _functions():
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
        yield mixer, "softmax attention" if isinstance(mixer, AttentionMixer) else "gates and layout"
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


def _functions() -> Iterator[tuple[Any, str, str]]:
    for module, name, part in FUNCTIONS:
        yield importlib.import_module(module), name, part
    for module, name, part in TRITON_FUNCTIONS:
        try:
            yield importlib.import_module(module), name, part
        except ImportError:  # no Triton here, and so nothing of it runs
            return


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
    opened = []

    def enter(*_: Any) -> None:
        opened.append(record_function(PREFIX + part))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
