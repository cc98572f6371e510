"""What a rank of a test needs imported, once for all: helpers.run_ranks forks its ranks from a process that has it."""

import hola_megatron.quiet  # isort: skip

import contextlib
import gc

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch

import hola_megatron.train.loop
import hola_megatron.train.replay  # noqa: F401
from hola_megatron.data.mds import import_streaming

import_streaming()
if not torch.cuda.is_available():  # where there is a GPU, DeepSpeed asks it things that no fork survives
    with contextlib.suppress(ImportError):
        from hola_megatron.engine.deepspeed import _deepspeed

        _deepspeed(torch.device("cpu"))
gc.collect()
gc.freeze()  # a collection in a fork would write to, and so copy, every page of what is imported here
