"""Step-level DAPO: the sheet's numbers, and the optimum."""

import pytest
import torch

from posttrain.objectives.oreo import Steps
from posttrain.objectives.step_dapo import advantage_regression, critic_losses, step_advantages


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def steps(values, exists, ratios=None):
    ratios = torch.zeros_like(values) if ratios is None else ratios
    return Steps(exists, ratios, torch.zeros_like(values), values)


def test_regression_as_in_the_sheet():
    ratios = t([[0.2, -0.1, 0.3], [0, 0.4, -0.2], [0.5, 0.5, 0], [-0.3, 0.1, 0.1]]).sum(1).requires_grad_()
    loss = advantage_regression(ratios, t([-0.25, 0, 0.25, 0]), 0.1).mean()
    assert loss.item() == pytest.approx(1.33875)
    loss.backward()
    torch.testing.assert_close(ratios.grad, t([0.725, 0.05, -0.375, -0.025]))


def test_regression_is_zero_at_the_tilted_reference():
    advantages = t([0.3, -0.1, 0.0])
    assert float(advantage_regression(advantages / 0.05, advantages, 0.05).max()) == 0


def test_cross_entropy_as_in_the_sheet():
    values, exists = t([[0.6], [0.1], [0.9]]).logit(), torch.ones(3, 1, dtype=torch.bool)
    losses = critic_losses(steps(values, exists), t([0.75, 0, 1]))
    assert losses.mean().item() == pytest.approx(0.2743043107)


def test_single_outcomes_have_the_gradient_of_their_mean():
    exists = torch.ones(4, 1, dtype=torch.bool)
    one = torch.full((4, 1), 0.3, dtype=torch.float64, requires_grad=True)
    other = torch.full((4, 1), 0.3, dtype=torch.float64, requires_grad=True)
    critic_losses(steps(one, exists), t([1, 0, 1, 1])).sum().backward()
    critic_losses(steps(other, exists), t([0.75] * 4)).sum().backward()
    assert one.grad.sum().item() == pytest.approx(other.grad.sum().item())


def test_advantages_end_in_the_outcome():
    exists = torch.tensor([[True, True, True], [True, True, False]])
    values = t([[0.5, 0.25, 0.75], [0.5, 0.25, 0.9]]).logit()
    found = step_advantages(steps(values, exists), t([1.0, 0.0]))
    torch.testing.assert_close(found, t([[-0.25, 0.5, 0.25], [-0.25, -0.25, 0.0]]))
