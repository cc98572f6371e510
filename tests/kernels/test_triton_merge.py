"""The merge of two outputs by the Triton kernels, interpreted: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import pytest
import torch
from interpreted import only_interpreted

only_interpreted()

from inputs import relative_error

from hola_kernels import KernelError
from hola_kernels.merge import merge_outputs
from hola_kernels.merge import verify_cases as cases
from hola_kernels.options import MERGES

GATES = {"add": (3,), "two": (2, 5, 3, 2), "convex": (2, 5, 3, 8)}


def inputs(merge: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=g).to(dtype).requires_grad_()
            for shape in ((2, 5, 3, 8), (2, 5, 3, 8), GATES[merge])]


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 33), (torch.float32, 256), (torch.float16, 64),
                                              (torch.bfloat16, 128)], ids=str)
def test_against_float64(merge, dtype, width):
    """Twice a GPU's limit, for bfloat16's sake: the interpreter truncates it."""
    for output, error in cases.measure(dtype=dtype, merge=merge, tokens=61, width=width, device="cpu").items():
        assert error < 2 * cases.limit(str(dtype).removeprefix("torch."), output), output


@pytest.mark.parametrize("merge", MERGES)
def test_saved_are_the_inputs(merge):
    given, saved = inputs(merge, torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        merge_outputs(*given, merge, backend="triton")
    assert [t.data_ptr() for t in saved] == [x.data_ptr() for x in given]


@pytest.mark.parametrize("merge", MERGES)
def test_one_token_a_sequence_and_no_token(merge):
    """What decoding merges: [N, H, V]."""
    given = [x.detach() if merge == "add" and n == 2 else x.detach()[:, 0] for n, x in enumerate(inputs(merge))]
    found = merge_outputs(*given, merge, backend="triton")
    assert relative_error(found, merge_outputs(*given, merge, backend="torch")) < 1e-6
    none = [x if merge == "add" and n == 2 else x[:0] for n, x in enumerate(given)]
    assert merge_outputs(*none, merge, backend="triton").shape == (0, 3, 8)


@pytest.mark.parametrize("merge", MERGES)
def test_gradients_at_other_strides(merge):
    given = inputs(merge)
    weight = torch.rand(5, 2, 3, 8).transpose(0, 1)
    have, want = (torch.autograd.grad((merge_outputs(*given, merge, backend=backend) * weight).sum(),
                                      given) for backend in ("triton", "torch"))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(have, want, strict=True))


@pytest.mark.parametrize("merge", MERGES)
def test_gates_whose_numbers_lie_apart(merge):
    state, exact, gate = inputs(merge)
    apart = torch.stack([gate, torch.zeros_like(gate)], -1).flatten(-2)[..., ::2]  # the same numbers, every second one
    have, want = (torch.autograd.grad(merge_outputs(state, exact, weights, merge, backend="triton").square().sum(),
                                      (state, exact, gate)) for weights in (apart, gate))
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_float64_is_refused():
    with pytest.raises(KernelError, match="the merge of two outputs does not take float64"):
        merge_outputs(*inputs("two", torch.float64), "two", backend="triton")
