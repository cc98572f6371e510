"""Documents of a packed row: a buffer of cu_seqlens that is filled again never meets the tables of its old numbers."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from interpreted import INTERPRETED

from hola_kernels import KernelError, PackedDocuments, exact_read, gated_delta_rule, hola_attention, packed, short_conv
from hola_kernels.memo import mark_constant, memoise
from hola_kernels.verify_cases import attention_inputs

BACKENDS = ["triton"] if INTERPRETED else ["reference", "torch"]
FIRST, SECOND, LENGTH = [0, 10, 96], [0, 70, 96], 96


def inputs() -> dict[str, torch.Tensor]:
    return {n: x.detach() for n, x in attention_inputs(1, LENGTH, 1, 64, 64, torch.float32, 0, "cpu").items()}


def calls(backend: str):
    """Every operation that takes cu_seqlens."""
    x = inputs()
    state = {n: x[n] for n in ("q", "k", "v", "log_decay", "beta")}
    read = {n: x[n] for n in ("q", "k", "v", "gamma_q", "gamma_k", "sink")}
    sizes = {"block": 16, "slots": 4, "backend": backend}
    conv = {"x": x["q"].flatten(2), "weight": x["q"].flatten()[:256].view(64, 4)}
    return [lambda cu: hola_attention(**x, **sizes, cu_seqlens=cu),
            lambda cu: gated_delta_rule(**state, backend=backend, cu_seqlens=cu)[0],
            lambda cu: exact_read(**read, **sizes, score=x["beta"], cu_seqlens=cu)[0],
            lambda cu: short_conv(**conv, backend=backend, cu_seqlens=cu)]


def by_copy(buffer, numbers):
    buffer.copy_(torch.tensor(numbers))


def by_data(buffer, numbers):
    buffer.data.copy_(torch.tensor(numbers))


def by_numpy(buffer, numbers):
    buffer.numpy()[:] = numbers


def by_alias(buffer, numbers):
    torch.from_dlpack(buffer.detach()).copy_(torch.tensor(numbers))


@pytest.mark.parametrize("fill", [by_copy, by_data, by_numpy, by_alias])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_buffer_filled_again(backend, fill):
    for call in calls(backend):
        expected = call(torch.tensor(SECOND, dtype=torch.int32))
        buffer = torch.tensor(FIRST, dtype=torch.int32)
        before = call(buffer)
        fill(buffer, SECOND)
        found = call(buffer)
        assert torch.equal(found, expected) and not torch.equal(found, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_buffer_filled_again_before_the_backward_pass(backend):
    """The backward pass is that of the documents of its forward pass."""
    x = {n: v.requires_grad_() for n, v in inputs().items()}
    conv = {"x": x["q"].flatten(2), "weight": torch.ones(64, 4)}
    gradients = []
    for refill in (False, True):
        buffer = torch.tensor(FIRST)
        y = hola_attention(**x, block=16, slots=4, cu_seqlens=buffer, backend=backend).sum()
        y = y + short_conv(**conv, cu_seqlens=buffer, backend=backend).square().sum()
        if refill:
            by_data(buffer, SECOND)
        gradients.append(torch.autograd.grad(y, list(x.values())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_inference_mode_and_then_training(backend):
    cu, x = torch.tensor(FIRST, dtype=torch.int32), inputs()
    conv = {"x": x["q"].flatten(2), "weight": torch.ones(64, 4), "backend": backend}
    made = []
    with torch.inference_mode():
        made.append(torch.tensor(FIRST))
        for cu_seqlens in (cu, made[0], None):
            hola_attention(**x, block=16, slots=4, cu_seqlens=cu_seqlens, backend=backend)
            short_conv(**conv, cu_seqlens=cu_seqlens)
    for cu_seqlens in (cu, made[0], None):
        leaves = {n: v.clone().requires_grad_() for n, v in x.items()}
        y = hola_attention(**leaves, block=16, slots=4, cu_seqlens=cu_seqlens, backend=backend)
        weight = conv["weight"].clone().requires_grad_()
        z = short_conv(**{**conv, "weight": weight}, cu_seqlens=cu_seqlens)
        assert all(g.isfinite().all() for g in torch.autograd.grad([y.sum(), z.sum()], [*leaves.values(), weight]))


if not INTERPRETED:
    def _receive(rank: int, port: int, results) -> None:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        buffer = torch.zeros(3, dtype=torch.int32)
        wrong = 0
        for numbers in (FIRST, SECOND):
            if rank == 0:
                buffer.copy_(torch.tensor(numbers))
            dist.broadcast(buffer, 0)
            wrong += sum(not torch.equal(call(buffer), call(torch.tensor(numbers))) for call in calls("torch"))
            if rank == 0:
                dist.send(torch.tensor(FIRST, dtype=torch.int32), 1)
            else:
                dist.recv(buffer, 0)
                wrong += sum(not torch.equal(call(buffer), call(torch.tensor(FIRST))) for call in calls("torch"))
        results[rank] = wrong
        dist.destroy_process_group()

    @pytest.mark.distributed
    def test_a_buffer_that_is_received():
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with mp.Manager() as manager:
            results = manager.dict()
            mp.spawn(_receive, (port, results), nprocs=2)
            assert dict(results) == {0: 0, 1: 0}

    def test_equal_cuts_serve_all_layers_and_go_with_their_tensor():
        cu = torch.tensor(FIRST)
        x = torch.zeros(1, LENGTH, 1)
        documents = packed.documents_of(x, cu)
        assert packed.documents_of(x, cu) is documents and packed.documents_of(x, documents) is documents
        assert packed.documents_of(x, cu.clone()) is not documents
        known = len(packed._kept)
        del cu
        gc.collect()
        assert len(packed._kept) < known

    def test_only_our_own_tensors_are_remembered():
        theirs, ours = torch.tensor([1]), mark_constant(torch.tensor([1]))
        assert memoise(theirs, "x", object) is not memoise(theirs, "x", object)
        assert memoise(ours, "x", object) is memoise(ours, "x", object)

    def test_documents_are_a_copy():
        cu = torch.tensor(FIRST, dtype=torch.int32)
        documents = PackedDocuments(cu)
        want = [call(documents) for call in calls("torch")]
        by_data(cu, SECOND)
        assert documents.count == 2 and documents.on(torch.device("cpu")).tolist() == FIRST
        assert all(torch.equal(call(documents), x) for call, x in zip(calls("torch"), want, strict=True))

    @pytest.mark.parametrize("cu", [[0, 10], [1, 96], [0, 50, 40, 96], [0, 97], [0], [[0, 96]], [0.0, 96.0],
                                    [False, True], [-1, 96]], ids=str)
    def test_cuts_that_are_none_are_named(cu):
        for call in calls("torch"):
            with pytest.raises(KernelError, match="cu_seqlens must be integers rising from 0 to T = 96, at") as error:
                call(torch.tensor(cu))
            assert "\n" not in str(error.value)

    def test_other_things_are_named():
        call = calls("torch")[0]
        with pytest.raises(KernelError, match="cu_seqlens must be a tensor or PackedDocuments, not list"):
            call(FIRST)
        with pytest.raises(KernelError, match="T = 96"):
            call(PackedDocuments(torch.tensor([0, 95])))
        with pytest.raises(KernelError, match="max_seqlen = 0"):
            PackedDocuments(torch.tensor(FIRST), 0)
else:
    def test_a_layout_is_made_once_for_documents():
        from hola_kernels.gated_delta import triton_layout

        cu_seqlens = mark_constant(torch.tensor([0, 0, 100, 101]))
        layout = triton_layout.layout_of(cu_seqlens, cu_seqlens.device, 1)
        assert triton_layout.layout_of(cu_seqlens, cu_seqlens.device, 1) is layout
        assert triton_layout.layout_of(cu_seqlens.clone(), cu_seqlens.device, 1) is not layout
