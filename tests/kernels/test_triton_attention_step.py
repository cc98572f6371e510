"""One decoded token by Triton's launches, interpreted: verify's own measure, tiny memories; and what is refused."""

from __future__ import annotations

import os

import pytest
import torch

from hola_kernels import HolaState, KernelError, gated_delta_step, hola_attention_step, short_conv_step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TINY = {"key": 16, "value": 32, "block": 8, "slots": 6, "before": (1, 6, 19), "steps": 6, "device": "cpu"}

if not INTERPRETED:
    def test_under_the_interpreter(interpreted):
        interpreted(__file__)

    def test_triton_is_refused_where_it_cannot_run():
        x, gate = torch.ones(1, 1, 48), torch.ones(1, 1)
        state = HolaState.empty(1, 1, 48, 48)
        arguments = {"q": x, "k": x, "v": x, "log_decay": -gate, "beta": gate}
        with pytest.raises(KernelError, match="triton cannot run here"):
            hola_attention_step(**arguments, gamma_q=x[0, 0], gamma_k=x[0, 0], gate=gate[0], sink=None, state=state,
                                backend="triton")
        with pytest.raises(KernelError, match="triton cannot run here"):
            gated_delta_step(**arguments, state=state.state, backend="triton")
        with pytest.raises(KernelError, match="triton cannot run here"):
            short_conv_step(x=x[0], weight=torch.ones(48, 4), tail=torch.zeros(1, 3, 48), backend="triton")
else:
    from hola_kernels.step_verify_cases import OPTIONS, limit, measure, measure_conv

    @pytest.mark.parametrize("option", OPTIONS)
    def test_float32(option):
        """A block fills at different steps, a cache is empty, half full and full; `few slots` drops most tokens."""
        check(measure(dtype=torch.float32, **{**TINY, **OPTIONS[option]}), "attention step float32")

    def test_half_precision():
        check(measure(dtype=torch.float16, **TINY), "attention step float16")

    def test_equal_scores_keep_the_earlier_token():
        state = HolaState.empty(1, 1, 16, 16, block=4, slots=3)
        x = torch.ones(1, 1, 16)
        for t in range(8):
            value = torch.full((1, 1, 16), 2.0 if t == 5 else 1.0)
            hola_attention_step(q=x, k=x, v=value, log_decay=torch.zeros(1, 1), beta=torch.ones(1, 1) / 2,
                                gamma_q=x[0, 0], gamma_k=x[0, 0], gate=x[0, 0, :1], sink=None, state=state,
                                score="betav", backend="triton")
        assert state.cache_position.flatten().tolist() == [0, 1, 5]
        assert state.cache_v[0, 0, :, 0].tolist() == [1.0, 1.0, 2.0] and not state.open_k.any()

    @pytest.mark.parametrize("width", [1, 2, 4])
    def test_the_convolution(width):
        check(measure_conv(dtype=torch.float32, width=width, channels=300, device="cpu"), "conv step float32")

    def check(errors, name):
        assert errors and not {output: error for output, error in errors.items() if not error <= limit(name, output)}
