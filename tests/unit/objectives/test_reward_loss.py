"""The loss of reward models against values by hand, in float64."""

import math

import pytest
import torch

from posttrain.objectives.reward import bradley_terry_loss


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("differences", "mean"),
    [((0.3, -0.1, 0.0, 0.5), 0.616494017321), ((0.2, 0.1, 0.4, -0.3), 0.652476506581)],
)
def test_mean_over_pairs(differences, mean):
    rejected = t(1.0, -2.0, 0.25, 3.0)
    losses = bradley_terry_loss(rejected + t(*differences), rejected)
    assert float(losses.mean()) == pytest.approx(mean, abs=1e-12)


def test_values_and_gradients_with_margin_and_centre():
    chosen, rejected = t(0.7).requires_grad_(), t(0.1).requires_grad_()
    losses = bradley_terry_loss(chosen, rejected, t(0.4), 0.01)
    # -log sigmoid(0.2) + 0.01 * 0.8^2; derivatives -+sigmoid(-0.2) + 0.02 * 0.8
    weight = 1 / (1 + math.exp(0.2))
    assert float(losses.detach()) == pytest.approx(math.log1p(math.exp(-0.2)) + 0.0064, abs=1e-12)
    found = torch.autograd.grad(losses.sum(), [chosen, rejected])
    assert [float(g) for g in found] == pytest.approx([-weight + 0.016, weight + 0.016], abs=1e-12)


def test_moving_both_scores_changes_only_the_centre():
    chosen, rejected = t(0.3, 2.0), t(0.5, -1.0)
    moved = bradley_terry_loss(chosen + 7, rejected + 7)
    torch.testing.assert_close(moved, bradley_terry_loss(chosen, rejected), rtol=1e-12, atol=0)
    assert (bradley_terry_loss(chosen + 7, rejected + 7, center=0.1) > moved + 1).all()


def test_finite_far_out():
    losses = bradley_terry_loss(t(-2000.0, 2000.0), t(0.0, 0.0))
    assert losses.tolist() == [2000.0, 0.0]
