"""What only a GPU shows of the operations: documents that lie there, waiting, other devices, compilation."""

from __future__ import annotations

import pytest
import torch

from hola_kernels import PackedDocuments, gated_delta_rule, gated_rms_norm, hola_attention, recording, short_conv
from hola_kernels.backend import triton_problem
from hola_kernels.cross_entropy import IGNORE_INDEX, cross_entropy_
from hola_kernels.verify_cases import attention_inputs

if not torch.cuda.is_available() or triton_problem("cuda"):
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

FIRST, SECOND, LENGTH = [0, 10, 700], [0, 600, 700], 700


def layer(x, cu, **options):
    y = short_conv(x=x["q"].flatten(2), weight=x["weight"], cu_seqlens=cu, backend="triton").view(x["q"].shape)
    given = {n: v for n, v in x.items() if n != "weight"}
    return hola_attention(**{**given, "q": y}, cu_seqlens=cu, backend="triton", **options)


def inputs(device="cuda"):
    x = {n: v.detach() for n, v in attention_inputs(1, LENGTH, 2, 128, 128, torch.bfloat16, 0, device).items()}
    return x | {"weight": torch.randn(256, 4, device=device).bfloat16()}


def gradients(x, cu, **options):
    leaves = {n: v.clone().requires_grad_() for n, v in x.items()}
    y = layer(leaves, cu, **options)
    return [y.detach(), *torch.autograd.grad(y.float().sum(), list(leaves.values()))]


@pytest.mark.parametrize("options", [{}, {"max_seqlen": LENGTH}], ids=str)
def test_a_buffer_on_the_gpu_filled_again(options):
    """Also in a way that changes no version: `.data`, as NCCL writes."""
    x, buffer = inputs(), torch.tensor(FIRST, device="cuda", dtype=torch.int32)
    for numbers in (FIRST, SECOND, FIRST):
        buffer.data.copy_(torch.tensor(numbers))
        expected = gradients(x, torch.tensor(numbers), **options)
        assert all(torch.equal(a, b) for a, b in zip(gradients(x, buffer, **options), expected, strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_a_graph_reads_the_documents_of_its_replay(packed):
    x, buffer = inputs(), torch.tensor(FIRST, device="cuda")
    other = torch.tensor(FIRST, device="cuda")

    def run():
        """Two layers on the buffer, filled again in between."""
        found = []
        for _ in range(2):
            cu = PackedDocuments(buffer, LENGTH) if packed else buffer
            found.append(layer(x, cu, max_seqlen=LENGTH))
            buffer.data.copy_(other)
        return found

    with torch.no_grad():
        run()
        graph = torch.cuda.CUDAGraph()
        with recording(), torch.cuda.graph(graph):
            found = run()
        for a, b in ((FIRST, SECOND), (SECOND, FIRST)):
            buffer.copy_(torch.tensor(a))
            other.copy_(torch.tensor(b))
            graph.replay()
            for y, numbers in zip(found, (a, b), strict=True):
                assert torch.equal(y, layer(x, torch.tensor(numbers), max_seqlen=LENGTH))


@pytest.mark.parametrize("where", ["cpu", "packed", "packed with max_seqlen"])
def test_no_layer_waits_for_the_device(where):
    x = inputs()
    cu = torch.tensor(FIRST)
    if where != "cpu":
        cu = PackedDocuments(cu.cuda(), LENGTH if "max" in where else None)
    gradients(x, cu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(x, cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_new_micro_batch_waits_for_nothing_where_its_cuts_lie_on_the_cpu():
    x = inputs()
    gradients(x, torch.tensor(FIRST))
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(x, torch.tensor(SECOND))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_gpu_that_is_not_the_current_one():
    here, cu = inputs("cuda:0"), torch.tensor(FIRST)
    there = {n: v.to("cuda:1") for n, v in here.items()}
    assert torch.cuda.current_device() == 0
    found, expected = gradients(there, cu), gradients(here, cu)
    assert torch.cuda.current_device() == 0
    assert all(a.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))
    normed = [gated_rms_norm(x=v["q"], gate=v["k"], weight=v["gamma_q"], backend="triton").cpu() for v in (here, there)]
    assert torch.equal(*normed)


def test_a_compiled_model_calls_the_operations_as_they_are():
    x = inputs()

    def model(scale, cu):
        return layer({**x, "q": x["q"] * scale}, cu).sin()

    compiled = torch.compile(model, backend="eager")
    for numbers in (FIRST, SECOND):
        scale = torch.tensor(1.5, device="cuda")
        assert torch.equal(compiled(scale, torch.tensor(numbers)), model(scale, torch.tensor(numbers)))


def test_autocast_changes_nothing():
    x = {n: v.float() for n, v in inputs().items()}
    expected = layer(x, None)
    with torch.autocast("cuda", torch.bfloat16):
        found = layer(x, None)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_second_derivative_is_an_error():
    x = inputs()
    x["v"].requires_grad_()
    o = gated_delta_rule(**{n: x[n] for n in ("q", "k", "v", "log_decay", "beta")}, backend="triton")[0]
    gradient = torch.autograd.grad(o.float().square().sum(), x["v"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once differentiable"):
        gradient.sum().backward()


def test_labels_outside_are_missing_numbers():
    labels = torch.tensor([3, IGNORE_INDEX, 40, -1, 2**32 + 3], device="cuda")
    logits = torch.randn(5, 40, device="cuda")
    losses = cross_entropy_(logits=logits, labels=labels, weight=torch.ones(5, device="cuda"), backend="triton")
    assert losses.isnan().tolist() == [False, False, True, True, True] and losses[1] == 0
    assert logits[0].isfinite().all() and not logits[1].any() and logits[2:].isnan().all()
