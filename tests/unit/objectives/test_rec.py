"""The REC family: values by hand in float64, masks at their edges, and the equivalences that its paper states."""

import math

import pytest
import torch

from posttrain.objectives.advantages import group_advantages
from posttrain.objectives.aggregation import aggregate
from posttrain.objectives.policy_gradient import clipped_surrogate, importance_ratio
from posttrain.objectives.rec import (
    balanced_rows,
    log_mean_exp_baseline,
    mirror_descent,
    rec_mask,
    rec_weight,
    token_square,
    weighted_reinforce,
)

RATIO = [0.5, 0.9, 1.1, 1.5, 3.5, 0.3]
ADVANTAGES = [1.0, 1.0, 1.0, 1.0, -1.0, -1.0]
PROBABILITIES = [0.3, 0.5, 0.6, 0.2, 0.7, 0.1]
CLIPS = ["none", "one_side", "two_side", "ring"]
MASKS = {"none": [1] * 6, "one_side": [1, 1, 1, 0, 1, 0], "two_side": [0, 1, 1, 0, 0, 0], "ring": [0, 1, 1, 0, 1, 0]}
VALUES = {  # without and with the importance weight
    "none": (0.226353914, 0.377124348),
    "one_side": (0.3418784441, 0.0898941245),
    "two_side": (0.2006621341, 0.1976234414),
    "ring": (0.1412163101, -0.0104369425),
}


def row(values):
    return torch.tensor([values], dtype=torch.float64)


@pytest.fixture
def example():
    """Log-probs, old log-probs, advantages and mask of one row with the ratios of RATIO."""
    logps = row(PROBABILITIES).log().requires_grad_()
    return logps, row(PROBABILITIES).log() - row(RATIO).log(), row(ADVANTAGES), torch.ones(1, 6, dtype=torch.bool)


def loss(example, clip, weight, temperature=1.0):
    logps, old, advantages, mask = example
    ratio = importance_ratio(logps, old, mask)
    kept = rec_mask(ratio, advantages, clip, 0.2, 0.2, 0.6, 2.0)
    losses = weighted_reinforce(logps, advantages, rec_weight(ratio, advantages, weight, temperature), kept)
    total = aggregate(losses, mask, "tokens")
    return total.value / total.count


@pytest.mark.parametrize("clip", CLIPS)
def test_masks(clip):
    kept = rec_mask(row(RATIO), row(ADVANTAGES), clip, 0.2, 0.2, 0.6, 2.0)
    assert kept.dtype == torch.bool and kept.int().tolist() == [MASKS[clip]]


def test_ring_edges():
    ratio, advantages = row([0.3, 0.39, 0.41, 3.01, 2.9]), row([1.0, 1.0, 1.0, -1.0, -1.0])
    assert rec_mask(ratio, advantages, "ring", 0.2, 0.2, 0.6, 2.0).int().tolist() == [[1, 1, 0, 1, 0]]


def test_a_token_with_advantage_zero_counts_as_unclipped():
    assert rec_mask(row([5.0, 0.01]), row([0.0, 0.0]), "one_side", 0.2, 0.2).all()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("weight", ["none", "importance"])
def test_values_and_gradients(example, clip, weight):
    found = loss(example, clip, weight)
    assert float(found.detach()) == pytest.approx(VALUES[clip][weight == "importance"], abs=1e-9)
    (gradient,) = torch.autograd.grad(found, example[0])
    factor = row(RATIO) if weight == "importance" else torch.ones(1, 6, dtype=torch.float64)
    expected = -factor * row(ADVANTAGES) * row(MASKS[clip]) / 6
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_red_weight(example):
    found = loss(example, "none", "advantage")
    assert float(found.detach()) == pytest.approx(1.6570155878, abs=1e-9)
    (gradient,) = torch.autograd.grad(found, example[0])
    expected = -row(ADVANTAGES).exp() * row(ADVANTAGES) / 6
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_one_side_with_the_importance_weight_has_the_gradient_of_ppo_and_another_value(example):
    logps, old, advantages, mask = example
    (mine,) = torch.autograd.grad(loss(example, "one_side", "importance"), logps)
    ppo = clipped_surrogate(importance_ratio(logps, old, mask), advantages, 0.2, 0.2).mean()
    (theirs,) = torch.autograd.grad(ppo, logps)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)
    assert float(ppo.detach()) == pytest.approx(0.1, abs=1e-12) != VALUES["one_side"][1]


def test_the_sequence_ratio():
    logps = row([0.2, -0.1, 0.05])
    ratio = importance_ratio(logps, torch.zeros_like(logps), torch.ones_like(logps, dtype=torch.bool), "sequence")
    assert ratio.tolist()[0] == pytest.approx([1.0512710964] * 3, abs=1e-10)


def test_asymre_by_the_regulariser_is_asymre_by_the_baseline():
    rewards = torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    logps = torch.tensor([[-0.5], [-1], [-2], [-0.3], [-0.7]], dtype=torch.float64).requires_grad_()
    advantages = rewards - rewards.mean()
    regularised = (-advantages.unsqueeze(1) * logps - 0.1 * logps).mean()
    shifted = (-(advantages + 0.1).unsqueeze(1) * logps).mean()
    assert float(regularised.detach()) == pytest.approx(-0.11, abs=1e-12)
    assert float(shifted.detach()) == pytest.approx(-0.11, abs=1e-12)
    one, other = (torch.autograd.grad(value, logps)[0] for value in (regularised, shifted))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_the_pairwise_surrogate_has_the_gradient_of_reinforce_at_the_sampling_policy():
    rewards = torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    shifts = torch.zeros(5, dtype=torch.float64).requires_grad_()
    tau, k = 1.0, 5
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    surrogate = sum((rewards[i] - rewards[j] - tau * (shifts[i] - shifts[j])) ** 2 for i, j in pairs) / (k * (k - 1))
    (gradient,) = torch.autograd.grad(surrogate, shifts)
    assert gradient.tolist() == pytest.approx([-0.3, 0.2, 0.2, -0.3, 0.2], abs=1e-12)
    expected = -(2 * tau / (k - 1)) * (rewards - rewards.mean())
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_token_and_sequence_squares():
    logps = row([0.1, 0.2, 0.3]).requires_grad_()
    old, mask = torch.zeros_like(logps), torch.ones_like(logps, dtype=torch.bool)
    token = 0.1 * token_square(logps, old).mean()
    assert float(token.detach()) == pytest.approx(0.0046666667, abs=1e-9)
    assert torch.autograd.grad(token, logps)[0].tolist()[0] == pytest.approx([0.02 / 3, 0.04 / 3, 0.02])
    sequence = mirror_descent(logps, old, torch.zeros(1, dtype=torch.float64), mask, 0.1).sum()
    assert float(sequence.detach()) == pytest.approx(0.018, abs=1e-12)
    assert torch.autograd.grad(sequence, logps)[0].tolist()[0] == pytest.approx([0.06] * 3)


def test_mirror_descent_by_hand():
    logps, old = row([-0.5, -1.0, 7.0]).requires_grad_(), row([-0.7, -1.1, 0.0])
    mask, advantages = row([1.0, 1.0, 0.0]).bool(), torch.tensor([2.0], dtype=torch.float64)
    loss = mirror_descent(logps, old, advantages, mask, 0.5)
    assert loss.tolist() == pytest.approx([2 * 1.5 + 0.25 * 0.3**2])
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist()[0] == pytest.approx([-2 + 0.5 * 0.3] * 2 + [0.0])


def test_squares_of_the_sampling_policy_itself_are_zero_with_gradient_zero():
    logps = row([-0.5, -2.0]).requires_grad_()
    mask = torch.ones_like(logps, dtype=torch.bool)
    for value in (token_square(logps, None).sum(), mirror_descent(logps, None, torch.zeros(1), mask, 0.1).sum()):
        assert float(value.detach()) == 0
        assert torch.autograd.grad(value, logps, retain_graph=True)[0].abs().max() == 0


def test_a_square_reads_nothing_outside_the_mask():
    logps, mask = row([0.1, math.inf]), row([1.0, 0.0]).bool()
    found = mirror_descent(logps, torch.zeros_like(logps), torch.zeros(1), mask, 2.0)
    assert found.tolist() == pytest.approx([0.01])


def test_log_mean_exp_baseline():
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0.3, 9.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    known = torch.tensor([True] * 6 + [False])
    found = log_mean_exp_baseline(rewards, groups, known, 0.5)
    assert found[:5].tolist() == pytest.approx([0.6342650682] * 5, abs=1e-10)
    assert found[5:].tolist() == pytest.approx([0.3, 0.3])  # the unknown row of that group does not enter
    assert log_mean_exp_baseline(rewards, groups, known, 1e-4)[0] == pytest.approx(1.0, abs=1e-3)
    assert log_mean_exp_baseline(rewards, groups, known, 1e6)[0] == pytest.approx(0.4, abs=1e-5)
    assert log_mean_exp_baseline(rewards, groups, torch.zeros(7, dtype=torch.bool), 1.0).tolist() == [0.0] * 7


def test_red_drop_keeps_no_more_negatives_than_positives():
    rewards = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    groups, known = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    kept = balanced_rows(rewards, groups, known, torch.tensor([0.0, 0.9, 0.1, 0.5], dtype=torch.float64))
    assert kept.tolist() == [True, True, False, False]
    assert group_advantages(rewards, groups, kept, scale="none").tolist() == [0.5, -0.5, 0.0, 0.0]


def test_red_drop_leaves_balanced_groups_and_groups_without_a_difference():
    rewards = torch.tensor([1.0, 1, 0, 0.1, 0.1, 0.1, 1, 0, 0, 0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    known = torch.tensor([True] * 8 + [False] * 2)
    draws = torch.arange(10, dtype=torch.float64)
    assert torch.equal(balanced_rows(rewards, groups, known, draws), known)


def test_scaled_by_the_groups_deviation():
    rewards = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    groups, known = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    assert float(group_advantages(rewards, groups, known)[0]) == pytest.approx(1.49970006, abs=1e-8)
