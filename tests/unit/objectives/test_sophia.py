"""SOPHIA: rewards that go back to descriptions, and the loss, by hand in float64."""

import pytest
import torch

from posttrain.objectives.sophia import description_rewards, propagated_rewards, semi_off_policy_loss

RIGHT = [[1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]]
LENGTHS = [[120, 90, 40, 200], [50, 60, 70, 30], [80, 60, 60, 100]]


def bools(rows):
    return torch.tensor(rows).flatten().bool()


def selected(alpha_c, known=((1,) * 4,) * 3, right=RIGHT, lengths=LENGTHS):
    """(description, reasoning) of the rows with R(c, y) = 1."""
    descriptions = torch.arange(12) // 4
    rewards = propagated_rewards(bools(right), bools(known), torch.tensor(lengths).flatten(), descriptions, alpha_c)
    assert set(rewards.tolist()) <= {0.0, 1.0}
    return [divmod(row, 4) for row in rewards.nonzero().flatten().tolist()]


def test_a_description_is_worth_the_share_of_its_right_reasonings():
    found = description_rewards(bools(RIGHT), torch.ones(12).bool(), torch.arange(12) // 4)
    assert found.dtype == torch.float64
    assert found.tolist() == [0.75] * 4 + [0.25] * 4 + [1.0] * 4


@pytest.mark.parametrize(
    ("alpha_c", "rows"),
    [
        (0.5, [(0, 1), (2, 1)]),  # of 60 and 60 tokens the first
        (0.0, [(0, 1), (1, 2), (2, 1)]),  # the short wrong ones of the first two are not taken
        (0.75, [(2, 1)]),  # above alpha_c, not at it
        (0.999, [(2, 1)]),
    ],
)
def test_the_shortest_right_reasoning_of_each_description_that_is_good_enough(alpha_c, rows):
    assert selected(alpha_c) == rows


def test_rows_that_nobody_can_judge_count_neither_for_nor_against_a_description():
    known = [[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    right = bools(RIGHT)
    found = description_rewards(right, bools(known), torch.arange(12) // 4)
    assert found.tolist() == [1.0] * 4 + [1.0] * 4 + [0.0] * 4
    assert selected(0.5, known) == [(0, 0), (1, 2)]


def test_the_loss_by_hand():
    logps = torch.tensor([[-10.0, -12.0, -8.0], [-20.0, -4.0, -99.0], [-1.0, -2.0, -3.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    rewards = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    losses = semi_off_policy_loss(logps, rewards, mask)
    assert losses.tolist() == [30.0, 24.0, 0.0]
    assert losses.sum() / 2 == 27.0  # over the rows that are kept
    assert losses.sum() / 12 == 4.5  # over all that were sampled
    of_tokens = torch.tensor([[1.0, 0.5, 2.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert semi_off_policy_loss(logps, of_tokens, mask).tolist() == [32.0, 24.0, 0.0]


def test_the_gradient_is_that_of_the_formula():
    logps = torch.rand(2, 3, dtype=torch.float64).sub(2).requires_grad_()
    mask, rewards = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: semi_off_policy_loss(x, rewards, mask), logps)
    semi_off_policy_loss(logps, rewards, mask).sum().backward()
    assert logps.grad.tolist() == [[-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]
