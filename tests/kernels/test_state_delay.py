"""The rule read late, against a loop over tokens in float64: outputs, scores, every gradient, packing."""

from __future__ import annotations

import pytest
import torch
from inputs import gradients, make_inputs, relative_error
from memory_definition import late_loop
from torch.utils._python_dispatch import TorchDispatchMode

from hola_kernels import KernelError, gated_delta_rule
from hola_kernels.moved_rows import moved_rows
from hola_kernels.state_delay import delayed_delta_rule

TOKENS = ("q", "k", "v", "log_decay", "beta")
BOUNDS = {"one": (0, 70), "ragged": (0, 1, 40, 104, 105, 150), "empty": (0, 0, 32, 32, 65, 97, 97)}
MODES = pytest.mark.parametrize("mode", ["stream", "chunk"])


def tokens_of(length, batch=1, **options):
    made = make_inputs(batch, length, key=8, value=12, **options)
    return {name: made[name] for name in TOKENS}


@MODES
@pytest.mark.parametrize("packing", BOUNDS)
@pytest.mark.parametrize("delay", [1, 7, 64, 200])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float64_matches_the_loop(mode, packing, delay, backend):
    bounds = BOUNDS[packing]
    inputs = tokens_of(bounds[-1])
    want, scores = late_loop(*(x[0] for x in inputs.values()), delay, mode, bounds)
    given = torch.tensor(bounds, dtype=torch.int32) if packing != "one" else None
    found, score = delayed_delta_rule(**inputs, delay=delay, mode=mode, cu_seqlens=given, backend=backend)
    assert relative_error(found[0], want) < 1e-9 and relative_error(score[0], scores) < 1e-9
    if delay < bounds[-1]:
        have, expected = gradients(found, inputs), gradients(want[None], inputs)
        for name, gradient in expected.items():
            assert (have[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


@MODES
def test_gradients_are_gathered(mode):
    """index_add, the gradient of index_select, would add rows one by one and in no fixed order on a GPU."""
    seen = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    inputs, bounds = tokens_of(60), torch.tensor([0, 25, 60])
    with Names():
        o, _ = delayed_delta_rule(**inputs, delay=20, mode=mode, cu_seqlens=bounds, backend="reference")
        torch.autograd.grad(o.sum(), inputs["q"])
    assert "index_select" in seen and not {"index_add", "index_add_", "scatter_add", "scatter_add_"} & seen


def test_moved_rows_have_both_derivatives():
    source, writes = torch.tensor([0, 1, 0, 2, 1, 2]), torch.tensor([False, False, True, False, True, True])
    read_at, write_at = torch.tensor([0, 1, 3]), torch.tensor([2, 4, 5])

    def there_and_back(x):
        twice = moved_rows(x, (source, None), (read_at, None), (write_at, None))
        valid = torch.tensor([True, False, True])
        return moved_rows(twice.square(), (read_at, valid), (source, ~writes & (source != 1)))

    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(there_and_back, x) and torch.autograd.gradgradcheck(there_and_back, x)


@MODES
def test_rows_are_documents(mode):
    inputs = tokens_of(50, batch=2)
    both, _ = delayed_delta_rule(**inputs, delay=16, mode=mode)
    for row in range(2):
        alone, _ = delayed_delta_rule(**{n: x[row: row + 1] for n, x in inputs.items()}, delay=16, mode=mode)
        assert relative_error(both[row], alone[0]) < 1e-12


@MODES
def test_nothing_leaks_between_documents(mode):
    """The last tokens of a document lie within the delay of the next one's first."""
    inputs = {name: x.detach() for name, x in tokens_of(60).items()}
    bounds = torch.tensor([0, 25, 60])
    before, _ = delayed_delta_rule(**inputs, delay=20, mode=mode, cu_seqlens=bounds)
    for name in ("k", "v", "q"):
        inputs[name][:, :25] += 3.0
    after, _ = delayed_delta_rule(**inputs, delay=20, mode=mode, cu_seqlens=bounds)
    assert torch.equal(before[:, 25:], after[:, 25:]) and not torch.equal(before[:, :25], after[:, :25])
    assert not after[:, 25:44].any()  # nothing has been written that these may read


def test_no_delay_is_the_rule():
    inputs = tokens_of(40)
    assert torch.equal(delayed_delta_rule(**inputs, delay=0)[0], gated_delta_rule(**inputs)[0])


def test_wrong_arguments_are_named():
    inputs = tokens_of(4)
    with pytest.raises(KernelError, match="delay = -1 must be a whole number"):
        delayed_delta_rule(**inputs, delay=-1)
    with pytest.raises(KernelError, match="mode: 'later' is not one of stream, chunk"):
        delayed_delta_rule(**inputs, delay=1, mode="later")
