"""Pairs within groups, and pair losses as advantages: the same gradient as the loss itself, for any split."""

import pytest
import torch

from posttrain.objectives.contrast import contrasted, group_pairs, group_shares
from posttrain.objectives.preference import dpo_loss

ALL = torch.ones(8, dtype=torch.bool)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(better, worse):
    return dpo_loss(better, worse, 0.1)


def test_two_right_and_six_wrong_make_twelve_pairs_or_one():
    rewards, groups = t(1, 0, 0, 1, 0, 0, 0, 0), torch.zeros(8, dtype=torch.int64)
    pairs = group_pairs(rewards, groups, ALL, "all")
    assert len(pairs) == 12 and set(pairs[:, 0].tolist()) == {0, 3}
    assert group_pairs(rewards, groups, ALL, "extremes").tolist() == [[0, 1]]


def test_ties_small_margins_and_unusable_completions_make_no_pair():
    rewards, groups = t(0.5, 0.5, 1.0, 0.7, 0.0, 0.2, 3.0, 1.0), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    usable = torch.tensor([True] * 7 + [False])
    assert group_pairs(rewards, groups, usable, "all").tolist() == [[2, 3], [5, 4]]
    assert group_pairs(rewards, groups, usable, "all", margin=0.25).tolist() == [[2, 3]]
    assert group_pairs(rewards, groups, usable, "all", margin=0.5).shape == (0, 2)


def test_every_group_weighs_one():
    assert group_shares(torch.tensor([7, 9, 7])).tolist() == [0.5, 1.0, 0.5]


def test_the_advantages_of_a_margin_of_one_and_a_half():
    losses, advantages = contrasted(t(1.0, -0.5), torch.tensor([[0, 1]]), t(1.0), sigmoid)
    assert losses.tolist() == pytest.approx([0.620957047790], abs=1e-11)
    assert advantages.tolist() == pytest.approx([0.046257015466, -0.046257015466], abs=1e-11)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_advantages_give_the_gradient_of_the_pair_loss_for_any_split(loss):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    reference = torch.randn(6, generator=generator, dtype=torch.float64)
    rewards, groups = t(1, 0, 0.5, 1, 0, 0), torch.tensor([0, 0, 0, 1, 1, 1])
    pairs = group_pairs(rewards, groups, ALL[:6], "all")
    shares = group_shares(groups[pairs[:, 0]])

    def logps(own, rows):
        return (inputs[rows] @ own).log_softmax(1)[:, 0]

    def of_pairs(better, worse):
        return dpo_loss(better, worse, 0.1, loss)

    own = weights.clone().requires_grad_()
    scores = logps(own, slice(None)) - reference
    exact = (shares * of_pairs(scores[pairs[:, 0]], scores[pairs[:, 1]])).sum()
    (expected,) = torch.autograd.grad(exact, own)
    losses, advantages = contrasted(scores, pairs, shares, of_pairs)
    assert float((shares * losses).sum()) == pytest.approx(float(exact.detach()))
    for size in (1, 2, 4, 6):
        own = weights.clone().requires_grad_()
        for start in range(0, 6, size):
            rows = slice(start, start + size)
            (-(advantages[rows] * logps(own, rows)).sum()).backward()
        torch.testing.assert_close(own.grad, expected, rtol=1e-12, atol=1e-15)
