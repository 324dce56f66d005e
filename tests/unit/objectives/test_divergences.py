"""Scores of f-DPO in the paper's parameterisation, and log1mexp."""

import math

import pytest
import torch

from posttrain.objectives.divergences import clamped, divergence_score, log1mexp
from posttrain.objectives.preference import dpo_loss


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("divergence", "alpha", "difference", "loss", "gradient"),
    [
        ("reverse_kl", None, 1.5, 0.620957047790, -0.046257015466),
        ("forward_kl", None, 1.280841829529, 0.631154383572, -0.017217591443),
        ("js", None, 0.660815296662, 0.660652162510, -0.013002931165),
        ("alpha", 0.3, 1.403386740155, 0.625437693864, -0.034446032300),
        ("alpha", 0.5, 1.354989513950, 0.627690947069, None),
        ("alpha", 0.7, 1.317831778288, 0.629424873342, None),
        ("alpha", 1e-6, 1.5, 0.620957047790, -0.046257015466),
        ("alpha", 1 - 1e-6, 1.280841829529, 0.631154383572, -0.017217591443),
    ],
)
def test_scores(divergence, alpha, difference, loss, gradient):
    within = 1e-5 if alpha in (1e-6, 1 - 1e-6) else 1e-11
    chosen, rejected = t(1.0).requires_grad_(), t(-0.5)
    scores = divergence_score(chosen, divergence, alpha), divergence_score(rejected, divergence, alpha)
    assert float((scores[0] - scores[1]).detach()) == pytest.approx(difference, abs=within)
    found = dpo_loss(*scores, 0.1)
    assert float(found.detach()) == pytest.approx(loss, abs=within)
    if gradient is not None:
        (grad,) = torch.autograd.grad(found.sum(), chosen)
        assert float(grad) == pytest.approx(gradient, abs=within)


def test_alpha_is_the_papers_and_not_one_minus_it():
    scores = divergence_score(t(1.0), "alpha", 0.3), divergence_score(t(-0.5), "alpha", 0.3)
    assert float(dpo_loss(*scores, 0.1)) != pytest.approx(0.629424873342, abs=1e-6)


@pytest.mark.parametrize(("divergence", "alpha"), [("forward_kl", None), ("alpha", 0.7), ("js", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_the_reference_all_is_finite(divergence, alpha, dtype):
    ratios = torch.tensor([-1000.0, -1000.0, 1000.0, 0.0], dtype=dtype).requires_grad_()
    scores = divergence_score(ratios, divergence, alpha)
    losses = dpo_loss(scores, scores.flip(0), 0.1)
    (grad,) = torch.autograd.grad(losses.sum(), ratios)
    assert scores.isfinite().all() and losses.isfinite().all() and grad.isfinite().all()
    assert clamped(ratios, divergence, alpha).tolist() == [divergence != "js"] * 2 + [False, False]


@pytest.mark.parametrize("alpha", [None, 0.0, 1.0])
def test_the_alpha_divergence_needs_its_alpha(alpha):
    with pytest.raises(ValueError, match="alpha within"):
        divergence_score(t(1.0), "alpha", alpha)


@pytest.mark.parametrize("a", [-1e-12, -1e-3, -0.5, -math.log(2), -0.7, -5.0, -50.0])
def test_log1mexp(a):
    x = t(a).requires_grad_()
    value = log1mexp(x)
    (grad,) = torch.autograd.grad(value.sum(), x)
    expected = math.log(-math.expm1(a)) if a > -1 else math.log1p(-math.exp(a))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-13)
    assert float(grad) == pytest.approx(math.exp(a) / math.expm1(a), rel=1e-9)


def test_log1mexp_in_float32_near_0():
    assert float(log1mexp(torch.tensor([-1e-8]))) == pytest.approx(-18.420680744, rel=1e-5)
