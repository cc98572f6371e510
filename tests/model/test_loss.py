"""The loss in pieces against output projection and cross-entropy in one go: value and every gradient."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import MICRO

from hola_megatron.config import build_recipe, load_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.model.logits import chunk_rows, logits_copies
from hola_megatron.startup.start import start


@pytest.fixture(scope="module", autouse=True)
def groups():
    start(load_recipe("recipes/hola_tiny.yaml"))


@pytest.mark.parametrize("rows", [1, 7, 12, 100])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)],
                         ids=str)
def test_pieces_are_the_whole(rows, dtype, limit):
    from megatron.core import parallel_state

    from hola_megatron.model.loss import summed_loss

    g = torch.Generator().manual_seed(rows)
    hidden = torch.randn(6, 4, 16, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, generator=g).to(dtype).requires_grad_()
    labels, mask = torch.randint(0, 40, (4, 6), generator=g), (torch.rand(4, 6, generator=g) > 0.3).float()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0].transpose(0, 1) @ exact[1].t()
    want = (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum()
    found = summed_loss(hidden=hidden, weight=weight, labels=labels, mask=mask, rows=rows, sequence_parallel=False,
                        group=parallel_state.get_tensor_model_parallel_group())
    for have, expected in zip((found, *torch.autograd.grad(3 * found, (hidden, weight))),
                              (want, *torch.autograd.grad(3 * want, exact)), strict=True):
        assert (have - expected).norm() < limit * expected.norm()
    with torch.no_grad():
        again = summed_loss(hidden=hidden, weight=weight, labels=labels, mask=mask, rows=rows, sequence_parallel=False,
                            group=parallel_state.get_tensor_model_parallel_group())
    assert torch.equal(again, found)


def test_a_token_that_does_not_count_may_have_no_number():
    """Its logits are infinite; the sum and all gradients are those without it."""
    from megatron.core import parallel_state

    from hola_megatron.model.loss import summed_loss

    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 2, 16, generator=g), torch.randn(40, 16, generator=g)
    labels, mask = torch.randint(0, 40, (2, 3), generator=g), torch.ones(2, 3)
    mask[0, 1], found = 0.0, []
    for size in (1.0, 3e38):
        hidden[1, 0] = size
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        total = summed_loss(hidden=leaves[0], weight=leaves[1], labels=labels, mask=mask, rows=4,
                            sequence_parallel=False,
                            group=parallel_state.get_tensor_model_parallel_group())
        found.append([total.detach(), *torch.autograd.grad(total, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0].isfinite()


@pytest.mark.parametrize("tokens", [1, 63, 100, 4096, 65536, 65600])
@pytest.mark.parametrize("budget", [1e-6, 1e-3, 0.03, 0.5, 2.0, 100.0])
@pytest.mark.parametrize("columns", [264, 32000])
def test_pieces_never_cost_more_than_the_budget(tokens, budget, columns):
    rows = chunk_rows(tokens, columns, 2, 2.0, budget)
    if rows is None:
        assert 2.0 * tokens * columns * 2 <= budget * 1e9
    else:
        assert 2.0 * tokens * columns * 2 > budget * 1e9
        assert rows == 1 or rows * columns * 2 <= budget * 1e9
        count = -(-tokens // rows)
        assert count <= 2 * tokens * columns * 2 / (budget * 1e9) + 1 or rows <= 64 or rows == 1


def test_no_budget_means_no_pieces():
    assert chunk_rows(10**7, 10**6, 2, 2.0, None) is None
    assert logits_copies(2, True) == 2 and logits_copies(2, False) == 3 and logits_copies(4, False) == 1


def test_logits_are_never_there_at_once(monkeypatch):
    """Through the engine: no tensor of more than a piece of logits is made, and the budget picks the path."""
    from hola_megatron.engine.megatron import MegatronEngine
    from hola_megatron.model import loss

    seen: list[int] = []
    one = loss.cross_entropy_
    monkeypatch.setattr(loss, "cross_entropy_", lambda **kw: (seen.append(kw["logits"].numel() * 4), one(**kw))[1])
    values = json.loads(json.dumps(MICRO))
    values["data"]["train"] = "unused"
    tokens = torch.randint(0, 264, (2, 65), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(2, 64), None)
    results = []
    for budget in (None, 1.0, 4e-5):
        values["train"]["logits_budget_gb"] = budget
        recipe = build_recipe(values)
        engine = MegatronEngine(recipe, start(recipe))
        results.append([(r.loss, r.grad_norm) for r in (engine.train_step([batch, batch], 1e-2) for _ in range(3))]
                       + [engine.evaluate([batch])])
    assert seen and max(seen) <= 4e4 and results[0] == results[1]
    for want, have in zip(results[0], results[2], strict=True):
        assert have == pytest.approx(want, rel=1e-5)
