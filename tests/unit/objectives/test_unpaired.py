"""Losses of single labelled completions against values derived by hand, in float64."""

import pytest
import torch

from posttrain.objectives.unpaired import bco_loss, kto_loss

GOOD = torch.tensor([True, True, False])


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(loss):
    """Of the rows u = 1.5 and -0.5, which are good, and 0.8, which is bad."""
    ratios = t(1.5, -0.5, 0.8).requires_grad_()
    losses = loss(ratios)
    return losses.detach().tolist(), torch.autograd.grad(losses.sum(), ratios)[0].tolist()


def near(expected):
    return pytest.approx(expected, abs=1e-11)


def test_kto():
    z0 = (0.3 - 0.1 + 0.2) / 3  # of three mismatched rows
    losses, gradient = value_and_gradient(lambda u: kto_loss(u, GOOD, z0, 0.1, 1.0, 1.33))
    assert losses == near([0.465886413977, 0.515828043017, 1.33 * 0.516660496569])
    assert sum(losses) == near(1.668872917431)
    assert gradient == near([-0.024883626325, -0.024974947305, 0.033213082905])


def test_kto_of_the_reference_itself_is_half_of_each_weight():
    losses = kto_loss(t(0.0, 0.0), torch.tensor([True, False]), 0.0, 0.1, 1.0, 3.0)
    assert losses.tolist() == [0.5, 1.5]


def test_bco():
    losses, gradient = value_and_gradient(lambda u: bco_loss(u, GOOD, 0.06, 0.1))
    assert losses == near([0.649159339026, 0.749658918622, 0.703197179727])
    # -beta sigmoid(-z) of the logits 0.09 and -0.11, beta sigmoid(z) of 0.02
    assert gradient == near([-0.047751517521, -0.052747230434, 0.050499983334])


def test_far_rows_are_finite_in_float32_and_kto_lets_them_be():
    ratios = torch.tensor([3e4, -3e4, 3e4, -3e4], requires_grad=True)
    good = torch.tensor([True, True, False, False])
    losses = kto_loss(ratios, good, 0.0, 0.5, 1.0, 1.0)
    assert losses.tolist() == [0.0, 1.0, 1.0, 0.0]
    (gradient,) = torch.autograd.grad(losses.sum(), ratios)
    assert not gradient.any()
    losses = bco_loss(ratios, good, 0.0, 0.5)
    assert losses.tolist() == [0.0, 15000.0, 15000.0, 0.0]
    (gradient,) = torch.autograd.grad(losses.sum(), ratios)
    assert gradient.tolist() == [0.0, -0.5, 0.5, 0.0]
