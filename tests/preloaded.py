"""What a rank of a test needs imported, once for all: helpers.run_ranks forks its ranks from a process that has it."""

import hola_megatron.quiet  # isort: skip

import contextlib

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch

import hola_megatron.replay
import hola_megatron.trainer  # noqa: F401
from hola_megatron.data.shards import _import_streaming

_import_streaming()
if not torch.cuda.is_available():  # where there is a GPU, DeepSpeed asks it things that no fork survives
    with contextlib.suppress(ImportError):
        from hola_megatron.engine.deepspeed import _deepspeed

        _deepspeed(torch.device("cpu"))
