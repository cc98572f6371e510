"""Which tokens of a generated task the exact caches hold when its questions begin."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch

from hola_kernels import exact_read
from hola_megatron.engine.base import Engine
from hola_megatron.evaluate.recall.mqar import Questions
from hola_megatron.layers.inspection import recorded_reads, replaced
from hola_megatron.layers.mixer import Mixer

BACKEND = "torch"  # whose operations can be recorded


@torch.no_grad()
def kept_shares(engine: Engine, drawn: Questions) -> list[float]:
    """For each layer with slots: the share of the stored values that a head's slots hold where the questions begin.

    The mean over samples and heads. drawn: samples whose questions begin after three quarters of them.
    """
    before = drawn.tokens.shape[1] * 3 // 4
    tokens = torch.from_numpy(drawn.tokens[:, :before]).to(engine.layout.device)
    with ExitStack() as stack:
        for module in engine.model[0].modules():
            if isinstance(module, Mixer):
                stack.enter_context(replaced(module, "model", replace(module.model, backend=BACKEND)))
        reads = stack.enter_context(recorded_reads())
        engine.model[0](tokens, None, None)
        positions = [exact_read(**read, backend=BACKEND)[1].cache_position for read in reads if read["slots"]]
    stored = torch.from_numpy(drawn.stored).to(tokens.device)
    return [float((held[:, :, None] == stored[:, None, :, None]).any(-1).double().mean()) for held in positions]
