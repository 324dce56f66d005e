"""Losses on expert rows by hand, in float64."""

import math

import pytest
import torch

from posttrain.objectives.expert import (
    accuracy_factor,
    accuracy_shift,
    entropy_ratio,
    expert_nll,
    expert_weight,
    mixing_weight,
    recall_extend_weight,
)

P = torch.tensor([[0.9, 0.5, 0.1]], dtype=torch.float64)


def mean(phi, cutoff=1.0, logits=None):
    logps = P.log() if logits is None else logits
    return expert_nll(logps, expert_weight(logps, phi), cutoff).mean()


@pytest.mark.parametrize(
    ("phi", "expected"), [("none", 1.0336975964), ("probability", 0.2238855212), ("uncertainty", 0.1300006333)]
)
def test_the_weighted_likelihood(phi, expected):
    assert float(mean(phi)) == pytest.approx(expected, abs=1e-10)


def test_the_weight_has_no_gradient():
    logps = P.log().requires_grad_()
    (grad,) = torch.autograd.grad(mean("uncertainty", logits=logps), logps)
    assert grad[0].tolist() == pytest.approx([-0.03, -0.0833333333, -0.03], abs=1e-10)


def test_gradient_on_the_logit_of_the_token():
    logits = (P / (1 - P)).log().requires_grad_()  # against one other token with logit 0
    (grad,) = torch.autograd.grad(mean("uncertainty", logits=torch.nn.functional.logsigmoid(logits)), logits)
    assert grad[0].tolist() == pytest.approx([-0.003, -0.0416666667, -0.027], abs=1e-10)


def test_tokens_above_the_cutoff_keep_a_value_and_lose_the_gradient():
    assert float(mean("uncertainty", cutoff=0.8)) == pytest.approx(0.1335341244, abs=1e-10)
    logps = P.log().requires_grad_()
    (grad,) = torch.autograd.grad(mean("uncertainty", cutoff=0.8, logits=logps), logps)
    assert grad[0, 0] == 0 and (grad[0, 1:] < 0).all()


def test_the_schedule_of_mu():
    steps = (0, 2, 4, 6, 8, 10, 12, 20)
    expected = (0, 0.45, 0.9, 0.775520382, 0.475, 0.174479618, 0.05, 0.05)
    assert [mixing_weight(s, 4, 8, 0.9, 0.05) for s in steps] == pytest.approx(expected, abs=1e-9)
    assert mixing_weight(0, 0, 0, 0.1, 0.1) == 0.1
    assert mixing_weight(0, 0, 0, 0.9, 0.2) == 0.2  # without warm-up and decay it stands in the valley


@pytest.mark.parametrize(
    ("expert", "policy", "accuracy", "ratio", "factor", "weight"),
    [
        (0.06, 0.02, 0.5, 2.9999985, 1.0, 2.9999985),
        (0.06, 0.02, 0.0, 2.9999985, 5.0, 14.9999925),
        (0.06, 0.02, 1.0, 2.9999985, 0.2, 1.0),
        (0.5, 0.02, 0.25, 5.0, 2.2360679775, 11.1803398875),
        (0.01, 0.05, 0.75, 1.0, 0.4472135955, 1.0),
    ],
)
def test_recall_extend_weights(expert, policy, accuracy, ratio, factor, weight):
    accuracy = torch.tensor([accuracy], dtype=torch.float64)
    found = entropy_ratio(expert, policy, 5.0)
    assert found == pytest.approx(ratio, abs=1e-9)
    assert entropy_ratio(-expert, policy, 5.0) == found
    assert float(accuracy_factor(accuracy, 5.0)) == pytest.approx(factor, abs=1e-9)
    assert float(recall_extend_weight(found, accuracy, 5.0)) == pytest.approx(weight, abs=1e-9)


@pytest.mark.parametrize(
    ("accuracy", "expected"), [(0.0, [0.9, 0.1]), (0.5, [0.9486832981, 0.316227766]), (1.0, [1.0, 1.0])]
)
def test_the_accuracy_shift(accuracy, expected):
    logps = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log().requires_grad_()
    shifted = accuracy_shift(logps, torch.tensor([[accuracy]], dtype=torch.float64))
    assert shifted[0].tolist() == pytest.approx(expected, abs=1e-9) and not shifted.requires_grad


def test_no_change_of_entropy_gives_the_bounds():
    assert entropy_ratio(0.0, 0.0, 5.0) == 1.0 and entropy_ratio(0.1, 0.0, 5.0) == 5.0
    assert math.isfinite(entropy_ratio(1e300, 0.0, 5.0))
