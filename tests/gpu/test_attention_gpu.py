"""Softmax attention on a GPU: flash attention over documents, and training with it."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_graph_gpu import run
from test_train_gpu import losses

from hola_kernels import PackedDocuments, recording
from hola_kernels.rotary import rotary_
from hola_kernels.rotary import verify_cases as rotary_cases
from hola_kernels.softmax_attention import flash_documents, softmax_attention
from hola_kernels.softmax_attention import verify_cases as attention_cases

CASES = {name: (case, module.limit) for module in (attention_cases, rotary_cases) for name, case in module.cases()}
LENGTH = 2048
MODEL = {"pattern": "AW", "attention_heads": 4, "attention_kv_heads": 2, "attention_qk_norm": True,
         "attention_window": 100}


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name):
    case, limit = CASES[name]
    for output, error in case().items():
        assert error <= limit(name, output), (output, error)


def test_flash_attention_takes_what_recipes_have():
    q = torch.empty(1, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
    assert flash_documents.flash_refusal(q, q) is None


def tensors() -> list[torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(1, LENGTH, heads, 64, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_()
            for heads in (4, 2, 2)]


def layer(x: list[torch.Tensor], documents: PackedDocuments) -> list[torch.Tensor]:
    """Output and gradients of a layer's attention, with positions, whole and in a window."""
    q, k, v = x
    found = []
    for window in (None, 100):
        turned = [rotary_(x=y.clone(), base=1e4, cu_seqlens=documents) for y in (q, k)]
        y = softmax_attention(q=turned[0], k=turned[1], v=v, cu_seqlens=documents, window=window)
        found += [y, *torch.autograd.grad(y.float().square().sum(), x)]
    return found


def test_nothing_waits_for_the_gpu():
    x = tensors()
    for cuts in ([0, 700, 2048], [0, 1, 64, 2048]):
        layer(x, PackedDocuments(torch.tensor(cuts)))  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            documents = PackedDocuments(torch.tensor(cuts))
            layer(x, documents)
            layer(x, PackedDocuments(torch.tensor(cuts, device="cpu").pin_memory().to("cuda", non_blocking=True), 2048))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_graph_serves_other_documents():
    """Recorded with one list of cuts, replayed with others; the last documents are empty."""
    x, cuts, stream = tensors(), torch.tensor([0, 700, 1024, 2048, 2048], device="cuda"), torch.cuda.Stream()

    def call() -> list[torch.Tensor]:
        return layer(x, PackedDocuments(cuts, LENGTH))

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    graph = torch.cuda.CUDAGraph()
    with recording() as tables, torch.cuda.graph(graph, stream=stream):
        found = call()
    for other in ([0, 700, 1024, 2048, 2048], [0, 1, 64, 100, 2048], [0, 2048, 2048, 2048, 2048]):
        cuts.copy_(torch.tensor(other))
        graph.replay()
        torch.cuda.synchronize()
        want = layer(x, PackedDocuments(torch.tensor(other)))
        for have, expected in zip(found, want, strict=True):
            assert (have.double() - expected.double()).norm() <= 8e-3 * expected.double().norm()
    assert tables.held


def test_float32_and_odd_heads_run_without_flash_attention_and_say_so(caplog, monkeypatch):
    import functools

    module = sys.modules["hola_kernels.softmax_attention"]
    monkeypatch.setattr(module, "_announce", functools.cache(module._announce.__wrapped__))
    x = torch.randn(1, 30, 2, 12, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        q = x.to(dtype)
        y = softmax_attention(q=q, k=q, v=q, cu_seqlens=torch.tensor([0, 9, 30]), window=5)
        wide = q.double()
        want = softmax_attention(q=wide, k=wide, v=wide, cu_seqlens=torch.tensor([0, 9, 30]), window=5,
                                 backend="reference")
        assert (y.double() - want).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * want.norm()
    said = [record.message for record in caplog.records if "softmax attention" in record.message]
    assert len(said) == 2 and "takes 16 bits, not float32" in said[0] and "heads of 12 and 12" in said[1]


def test_training_in_16_bits_is_near_float32_on_the_cpu():
    for want, have in zip(losses("cpu", backend="torch", **MODEL),
                          losses("cuda", precision="bf16", backend="triton", **MODEL), strict=True):
        assert have[0] == pytest.approx(want[0], rel=5e-3)
        assert have[1] == pytest.approx(want[1], rel=5e-2)


def test_training_in_float32_is_the_cpu_s():
    for want, have in zip(losses("cpu", backend="torch", **MODEL), losses("cuda", backend="triton", **MODEL),
                          strict=True):
        assert have[0] == pytest.approx(want[0], rel=1e-5)
        assert have[1] == pytest.approx(want[1], rel=1e-3)


@pytest.mark.parametrize("pattern", ["A", "WG", "HAW"])
def test_a_recorded_step_over_documents_is_near_the_step(pattern):
    """Near: flash attention's backward pass adds in no fixed order."""
    changes = {"model": {**MODEL, "pattern": pattern}}
    want, _ = run("plain", **changes)
    have, recorded = run("graph", **changes)
    assert recorded == [0, 7]
    for one, other in itertools.zip_longest(have, want):
        assert one == pytest.approx(other, rel=5e-3)
