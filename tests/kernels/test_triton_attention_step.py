"""One decoded token by Triton's launches, interpreted: verify's own measure, tiny memories; and what is refused."""

from __future__ import annotations

import pytest
import torch
from interpreted import INTERPRETED

from hola_kernels import HolaState, KernelError, gated_delta_step, hola_attention_step, short_conv_step

TINY = {"key": 16, "value": 32, "block": 8, "slots": 6, "before": (1, 6, 19), "steps": 6, "device": "cpu"}

if not INTERPRETED:
    def test_what_does_not_fit_the_memory_is_named():
        """Kernels would write to any address."""
        x, gate, state = torch.ones(2, 3, 16), torch.ones(2, 3), HolaState.empty(2, 3, 16, 16)
        given = {"q": x, "k": x, "v": x, "log_decay": -gate, "beta": gate, "gamma_q": x[0, 0], "gamma_k": x[0, 0],
                 "gate": gate[0], "sink": gate[0], "state": state}
        for change, message in (({"q": x[..., :8]}, "must be the same"), ({"v": x[:1]}, "with the N, H of q"),
                             ({"beta": gate[:, :2]}, "beta .* must be"),
                             ({"gate": gate[0, :2]}, "gate .2,. must be .3."), ({"sink": gate[:, :1]}, "sink"),
                             ({"gamma_k": x[0]}, "gamma_k"),
                             ({"state": HolaState.empty(1, 3, 16, 16)}, "state .1, 3, 16, 16. must be"),
                             ({"state": HolaState.empty(2, 3, 16, 8)}, "state .2, 3, 16, 8. must be")):
            with pytest.raises(KernelError, match=message):
                hola_attention_step(**given | change)
        wrong = HolaState.empty(2, 3, 16, 16)
        wrong.cache_k = wrong.cache_k[:, :1]
        with pytest.raises(KernelError, match="state has"):
            hola_attention_step(**given | {"state": wrong})

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

    def test_scattered_memories_are_refused_and_scattered_parameters_taken():
        given = {"q": torch.randn(1, 2, 16), "k": torch.randn(1, 2, 16), "v": torch.randn(1, 2, 16),
                 "log_decay": torch.zeros(1, 2), "beta": torch.rand(1, 2)}
        parameters = {"gamma_q": torch.randn(16, 3)[:, 1], "gamma_k": torch.randn(16, 3)[:, 0],
                      "gate": torch.randn(2, 5)[:, 2], "sink": torch.randn(1).expand(2)}
        results = [hola_attention_step(**given, **parameters, state=HolaState.empty(1, 2, 16, 16, block=4, slots=2),
                                       backend=backend) for backend in ("torch", "triton")]
        assert torch.allclose(*results, atol=1e-5)
        scattered = torch.zeros(1, 2, 16, 16).mT
        with pytest.raises(KernelError, match="a state that is not contiguous"):
            gated_delta_step(**given, state=scattered, backend="triton")
        memory = HolaState.empty(1, 2, 16, 16, block=4, slots=2)
        memory.cache_v = memory.cache_v.mT.contiguous().mT
        with pytest.raises(KernelError, match="whose cache_v is not contiguous"):
            hola_attention_step(**given, **parameters, state=memory, backend="triton")

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

    @pytest.mark.parametrize("width", [1, 2, 3, 4])
    def test_the_convolution(width):
        check(measure_conv(dtype=torch.float32, width=width, channels=300, device="cpu"), "conv step float32")

    def check(errors, name):
        assert errors and not {output: error for output, error in errors.items() if not error <= limit(name, output)}
