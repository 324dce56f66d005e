"""Masked action spaces by hand, in float64."""

import math
from contextlib import nullcontext

import pytest
import torch

from posttrain.objectives.action_mask import ActionMask, MaskRule, masked_logps, nucleus
from posttrain.objectives.policy_gradient import importance_ratio


def t(values):
    return torch.tensor(values, dtype=torch.float64)


Q = t([[0.5, 0.3, 0.12, 0.05, 0.03]]).log()


@pytest.mark.parametrize(
    ("top_p", "least", "expected"),
    [(0.9, 1, [1, 1, 1, 0, 0]), (0.5, 1, [1, 0, 0, 0, 0]), (0.5, 4, [1, 1, 1, 1, 0]), (1.0, 1, [1, 1, 1, 1, 1])],
)
def test_the_sets_of_the_sheet(top_p, least, expected):
    assert nucleus(Q, top_p, least).int().tolist() == [expected]
    order = [3, 0, 4, 2, 1]  # it does not depend on where the likely tokens stand
    assert nucleus(Q[:, order], top_p, least).int().tolist() == [[expected[i] for i in order]]


def test_at_least_as_many_as_there_are_and_the_likeliest_always():
    assert nucleus(Q, 1e-9, 1).sum() == 1
    assert nucleus(Q, 0.5, 99).all()


def test_special_tokens_are_always_allowed():
    mask = ActionMask(nullcontext, MaskRule(0.5, 1, 1), always=(4,))
    assert mask.allowed(Q).int().tolist() == [[1, 0, 0, 0, 1]]


def test_the_masked_ratio_of_the_sheet():
    old, new = t([[0.2, 0.2, 0.2, 0.3, 0.1]]).log(), t([[0.3, 0.15, 0.2, 0.25, 0.1]]).log()
    allowed = nucleus(Q, 0.9)
    before, after = masked_logps(old, allowed)[:, :1], masked_logps(new, allowed)[:, :1]
    assert float(before) == pytest.approx(-1.0986122887, abs=1e-10)
    assert float(importance_ratio(after, before, torch.ones(1, 1).bool())) == pytest.approx(1.3846153846, abs=1e-10)
    assert float((new - old).exp()[0, 0]) == pytest.approx(1.5)
    assert math.isinf(float(masked_logps(old, allowed)[0, 3]))


def test_the_gradient_is_that_of_a_softmax_over_the_allowed_tokens():
    logits = t([[0.2, -0.4, 1.0, 0.7, -1.0]]).requires_grad_()
    allowed = nucleus(Q, 0.9)
    (grad,) = torch.autograd.grad(masked_logps(logits, allowed)[0, 0], logits)
    inside = logits.detach()[0, :3].softmax(0)
    torch.testing.assert_close(grad[0], torch.cat([t([1.0, 0, 0]) - inside, t([0.0, 0.0])]))
