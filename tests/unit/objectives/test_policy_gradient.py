"""Values derived by hand from the papers' formulas, in float64. Four rows, two tokens; see `example`."""

import pytest
import torch

from posttrain.objectives.aggregation import aggregate, count, masked
from posttrain.objectives.policy_gradient import (
    clipped_shares,
    clipped_surrogate,
    engine_weights,
    importance_ratio,
    kl_k3,
    soft_overlong_penalty,
    soft_surrogate,
    truncated_importance_loss,
)

RATIO = [[1.1, 0.9], [1.5, 1.0], [0.6, 1.0], [1.3, 0.7]]
MASK = [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
PROBABILITIES = [[0.5, 0.4], [0.3, 0.2], [0.6, 0.1], [0.7, 0.2]]
ADVANTAGE = 0.8658754298  # of rewards [1, 0, 0, 1]: 0.5 / (0.5773502692 + 1e-4)


@pytest.fixture
def example():
    """Log-probs, old log-probs, advantages and mask with the ratios of RATIO."""
    logps = torch.tensor(PROBABILITIES, dtype=torch.float64).log()
    old = logps - torch.tensor(RATIO, dtype=torch.float64).log()
    advantages = torch.tensor([1, -1, -1, 1], dtype=torch.float64) * ADVANTAGE
    return logps, old, advantages, torch.tensor(MASK, dtype=torch.bool)


def divided(loss_sum):
    return float(loss_sum.value.detach() / loss_sum.count)


@pytest.mark.parametrize(
    ("aggregation", "epsilon_high", "expected"),
    [
        ("sequences", 0.2, 0.0216468857),
        ("tokens", 0.2, -0.074217894),
        ("constant", 0.2, -0.0649406572),
        ("tokens", 0.28, -0.0841136132),
    ],
)
def test_clipped_surrogate_under_each_aggregation(example, aggregation, epsilon_high, expected):
    logps, old, advantages, mask = example
    losses = clipped_surrogate(importance_ratio(logps, old, mask), advantages, 0.2, epsilon_high)
    assert divided(aggregate(losses, mask, aggregation, max_length=2)) == pytest.approx(expected, abs=1e-9)


def test_sequence_ratio_is_the_geometric_mean_and_gives_gspo(example):
    logps, old, advantages, mask = example
    ratio = importance_ratio(logps, old, mask, "sequence")
    assert ratio[:, 0].tolist() == pytest.approx([0.9949874371, 1.2247448714, 0.6, 0.9539392014], abs=1e-9)
    assert torch.equal(ratio[:, 0], ratio[:, 1])
    losses = clipped_surrogate(ratio, advantages, 3e-4, 4e-4)
    assert divided(aggregate(losses, mask, "sequences")) == pytest.approx(0.0596411171, abs=1e-9)


def test_trajectory_ratio_gives_the_rloo_loss(example):
    logps, old, advantages, mask = example
    ratio = importance_ratio(logps, old, mask, "trajectory")
    assert ratio[:, 0].tolist() == pytest.approx([0.99, 1.5, 0.6, 0.91])
    losses = clipped_surrogate(ratio, advantages, 0.2, 0.2)
    assert divided(aggregate(losses, mask, "sequences")) == pytest.approx(0.086587543, abs=1e-9)


def test_cispo_caps_the_weight_and_keeps_every_gradient(example):
    logps, old, advantages, mask = example
    logps = logps.clone().requires_grad_()
    losses = truncated_importance_loss(logps, importance_ratio(logps, old, mask), advantages, cap=1.2)
    total = aggregate(losses, mask, "tokens")
    assert divided(total) == pytest.approx(-0.0270846605, abs=1e-9)
    total.value.backward()
    capped = torch.tensor(RATIO, dtype=torch.float64).clamp(max=1.2)
    assert torch.allclose(logps.grad, -capped * advantages.unsqueeze(1) * mask)


def test_on_policy_ratio_is_one_with_the_gradient_of_the_log_prob(example):
    logps, _, advantages, mask = example
    logps = logps.clone().requires_grad_()
    ratio = importance_ratio(logps, None, mask)
    assert torch.equal(ratio, torch.ones_like(ratio))
    aggregate(clipped_surrogate(ratio, advantages, 0.2, 0.2), mask, "tokens").value.backward()
    assert torch.allclose(logps.grad, -advantages.unsqueeze(1) * mask)


def test_clip_takes_the_gradient_away_only_beyond_the_bound(example):
    logps, old, advantages, mask = example
    logps = logps.clone().requires_grad_()
    ratio = importance_ratio(logps, old, mask)
    clipped_surrogate(ratio, advantages, 0.2, 0.2).sum().backward()
    # Row 0: A > 0, ratios inside. Row 1: A < 0, 1.5 is above, which hurts: kept. Row 2: A < 0, 0.6 is below: clipped.
    # (its second token is masked). Row 3: A > 0: 1.3 above: clipped; 0.7 below, which hurts: kept.
    assert ((logps.grad != 0) == torch.tensor([[1, 1], [1, 1], [0, 0], [0, 1]], dtype=torch.bool)).all()
    low, high = clipped_shares(ratio, advantages, 0.2, 0.2)
    assert low.tolist() == [[0, 0], [0, 0], [1, 0], [0, 0]]
    assert high.tolist() == [[0, 0], [0, 0], [0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("advantage", "losses", "slopes"),
    [
        (1.0, [-1.510162675193, -2.0, -2.489837324807], [-0.940014848806, -1.0, -0.940014848806]),
        (-1.0, [1.415938330303, 1.904761904762, 2.393585479220], [0.934139823285, 1.0, 0.934139823285]),
    ],
)
def test_soft_surrogate(advantage, losses, slopes):
    ratio = torch.tensor([[0.5, 1.0, 1.5]], dtype=torch.float64, requires_grad=True)
    found = soft_surrogate(ratio, torch.tensor([advantage], dtype=torch.float64), 1.0, 1.05)
    assert found[0].tolist() == pytest.approx(losses, abs=1e-11)
    found.sum().backward()
    assert ratio.grad[0].tolist() == pytest.approx(slopes, abs=1e-11)


def test_dual_clip_bounds_only_negative_advantages():
    ratio = torch.tensor([[1.3, 0.7, 0.9], [1.5, 5.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    losses = clipped_surrogate(ratio, torch.tensor([1.0, -1.0], dtype=torch.float64), 0.2, 0.2, dual_clip=3.0)
    assert losses[0].tolist() == pytest.approx([-1.2, -0.7, -0.9])
    assert losses[1, :2].tolist() == pytest.approx([1.5, 3.0])
    assert divided(aggregate(losses, mask, "tokens")) == pytest.approx(0.34)


def test_k3_by_hand():
    logps = torch.tensor([0.5], dtype=torch.float64).log()
    ref = torch.tensor([0.25], dtype=torch.float64).log()
    assert float(kl_k3(logps, ref)) == pytest.approx(0.5 + 0.6931471806 - 1)
    assert float(kl_k3(logps, logps)) == 0.0


def test_soft_overlong_penalty():
    penalty = soft_overlong_penalty(torch.tensor([15, 16, 17, 19, 20, 21]), max_length=20, cache=4)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]


def test_constant_aggregation_needs_the_length():
    with pytest.raises(ValueError, match="max_length"):
        aggregate(torch.ones(1, 2), torch.ones(1, 2).bool(), "constant")


@pytest.mark.parametrize("aggregation", ["tokens", "sequences", "constant"])
def test_an_empty_mask_gives_a_zero_with_a_gradient(aggregation):
    logps = torch.full((2, 3), float("nan"), dtype=torch.float64).requires_grad_()
    total = aggregate(-logps, torch.zeros(2, 3, dtype=torch.bool), aggregation, max_length=4)
    total.value.backward()
    assert float(total.value) == 0 and float(total.count) == 0
    assert torch.equal(logps.grad, torch.zeros_like(logps))


def test_rows_without_tokens_are_not_counted():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    assert float(count(mask, "sequences")) == 1
    assert float(count(mask, "tokens")) == 2


def test_masked_ignores_what_is_not_finite():
    assert masked(torch.tensor([float("inf"), 2.0]), torch.tensor([False, True])).tolist() == [0.0, 2.0]


def test_gradcheck(example):
    logps, old, advantages, mask = example

    def loss(level):
        def f(x):
            ratio = importance_ratio(x, old, mask, level)
            return aggregate(clipped_surrogate(ratio, advantages, 0.2, 0.2), mask, "sequences").value

        return f

    for level in ("token", "sequence", "trajectory"):
        assert torch.autograd.gradcheck(loss(level), (logps.clone().requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x: kl_k3(x, old).sum(), (logps.clone().requires_grad_(),))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"high": 2.0}, [1.349858807576, 0.406569659741, 2.0, 1.051271096376]),
        ({"high": 5.0, "low": 0.5}, [1.349858807576, 0.5, 5.0, 1.051271096376]),
        ({"high": 5.0, "low": 0.5, "keeps_extremes": False}, [1.349858807576, 0.0, 0.0, 1.051271096376]),
        ({"high": 3.0, "level": "sequence"}, [3.0] * 4),
        ({"high": 3.0, "level": "sequence", "keeps_extremes": False}, [0.0] * 4),
        ({"high": 4.0, "level": "sequence", "keeps_extremes": False}, [3.490342957462] * 4),
        ({"high": 2.0, "level": "geometric"}, [1.366837941174] * 4),
        ({"high": 1.001, "low": 0.999, "level": "geometric", "keeps_extremes": False}, [0.0] * 4),
    ],
)
def test_engine_weights_by_level_and_mode(how, expected):
    """The fifth token is somebody else's, and far off."""
    ratios = torch.tensor([[0.3, -0.9, 1.8, 0.05, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True, False]])
    found = engine_weights(ratios, torch.zeros_like(ratios), mask, **how)
    # exp(1.8) is 6.0496, so a bound of 5 holds it
    assert found[0].tolist() == pytest.approx([*expected, 1.0], abs=1e-11)


def test_engine_weights_are_truncated_and_one_outside_of_the_mask():
    trainer = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.1, 0.9]], dtype=torch.float64).log()
    engine = torch.tensor([[0.4, 0.5, 0.1], [0.1, 0.0, 0.9]], dtype=torch.float64).log()
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()
    found = engine_weights(trainer, engine, mask, 2.5)
    expected = torch.tensor([[1.25, 0.8, 2.5], [2.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
