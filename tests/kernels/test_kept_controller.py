"""Routing scores and the threshold that keeps a wanted share of tokens."""

from __future__ import annotations

import pytest
import torch

from hola_kernels import KernelError, kept_attention
from hola_kernels.kept_attention.controller import ShareThreshold, cosine_score, learned_logit


def test_the_cosine_score_is_large_where_the_memory_is_wrong():
    v = torch.tensor([[3.0, 4.0]] * 5)
    retrieved = torch.tensor([[6.0, 8.0], [-3.0, -4.0], [-4.0, 3.0], [0.0, 0.0], [1e-30, 0.0]])
    expected = torch.tensor([0.0, 2.0, 1.0, 1.0])
    assert torch.allclose(cosine_score(v, retrieved)[:4], expected, atol=1e-6)
    assert torch.allclose(cosine_score(retrieved, v)[:4], expected, atol=1e-6)
    assert cosine_score(torch.zeros(2, 8), torch.zeros(2, 8)).tolist() == [1, 1]
    assert cosine_score(v, retrieved).isfinite().all()
    assert cosine_score(v.bfloat16(), retrieved.bfloat16()).dtype == torch.float32
    zero = torch.zeros(1, 4, requires_grad=True)
    cosine_score(zero, torch.ones(1, 4)).sum().backward()
    assert zero.grad.isfinite().all()


def test_the_threshold_finds_the_share():
    """Scores of a skewed distribution: the threshold becomes the quantile that keeps the share."""
    g = torch.Generator().manual_seed(0)
    for target in (0.1, 0.5):
        control = ShareThreshold(target, start=0.0, rate=0.05)
        for _ in range(600):
            control.count(control.keep(torch.rand(2, 200, 3, generator=g) ** 3))
            control.update()
        assert float(control.threshold) == pytest.approx((1 - target) ** 3, abs=0.03)


def test_one_update_is_the_formula_and_the_first_ones_are_frozen():
    control = ShareThreshold(0.25, start=0.5, rate=0.1, freeze=2)
    seen = []
    for kept in (4, 0, 3, 1, 0):
        control.update(torch.tensor([kept, 4]))
        seen.append(float(control.threshold))
    assert seen == pytest.approx([0.5, 0.5, 0.55, 0.55, 0.525])
    other = ShareThreshold(0.25, rate=0.1, freeze=2)
    other.load_state_dict(control.state_dict())
    for x in (control, other):
        x.update(torch.tensor([2, 4]))
    assert torch.equal(control.threshold, other.threshold) and int(other.updates) == 6


def test_what_was_counted_is_the_share_and_is_forgotten_by_the_update():
    control = ShareThreshold(0.5, start=1.0, rate=1.0)
    control.count(torch.tensor([[[True, False], [True, True]]]))
    control.count(torch.tensor([[[True, True], [True, True]]]))
    assert control.counted.tolist() == [7, 8]
    control.update()
    assert float(control.threshold) == 1.375 and control.counted.tolist() == [0, 0]
    control.update()  # a step without tokens says nothing about the share
    assert float(control.threshold) == 1.375 and "counted" not in control.state_dict()


def test_scores_that_are_no_numbers_keep_nothing():
    assert ShareThreshold(0.5, start=-1.0).keep(torch.tensor([0.0, torch.nan])).tolist() == [True, False]


def test_a_learned_score_is_one_small_network_a_head():
    g = torch.Generator().manual_seed(0)
    inner, weight, bias = (torch.randn(*shape, generator=g) for shape in ((3, 2 * 5), (2, 5), (2,)))
    found = learned_logit(inner, weight, bias)
    for head in range(2):
        u = inner[:, 5 * head: 5 * head + 5]
        assert torch.allclose(found[:, head], (u / (1 + torch.exp(-u))) @ weight[head] + bias[head], atol=1e-6)
    assert learned_logit(inner.bfloat16(), weight, bias).dtype == torch.float32


def test_a_learned_router_has_a_gradient_through_the_read():
    torch.manual_seed(0)
    inner, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((1, 30, 8), (2, 4), (2,)))
    v, logit = torch.randn(1, 30, 2, 8), learned_logit(inner, weight, bias)
    score = logit.detach().sigmoid()
    o = kept_attention(q=v, k=v, v=v, keep=score >= score.median(), log_weight=torch.nn.functional.logsigmoid(logit))
    o[:, -1].square().sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in (inner, weight, bias))


@pytest.mark.parametrize("wrong", [{"target": 1.5}, {"target": float("nan")}, {"rate": -1.0}, {"start": float("inf")}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(KernelError, match=f"{next(iter(wrong))} = .* must be a finite number"):
        ShareThreshold(**{"target": 0.5, **wrong})
