"""A-LoL and its relatives against values by hand, in float64."""

import pytest
import torch

from posttrain.objectives.leftover import leftover_advantages, leftover_loss, leftover_weights

LOGPS = torch.tensor([[-10.0], [-8.0], [-5.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-10.5], [-8.0], [-2.0]], dtype=torch.float64)
REWARDS = torch.tensor([0.9, 0.2, 0.8], dtype=torch.float64)
VALUES = torch.full((3,), 0.5, dtype=torch.float64)
MASK = torch.ones(3, 1, dtype=torch.bool)


def loss(weighting, advantages, logps=LOGPS, reference=REFERENCE, mask=MASK):
    weights, _ = leftover_weights(logps, mask, weighting, 0.9, reference)
    return leftover_loss(logps, mask, weights, advantages)


def test_advantages_keep_what_is_better_than_the_value():
    assert leftover_advantages(REWARDS, VALUES).tolist() == pytest.approx([0.4, 0.0, 0.3])


def test_sequence_ratio():
    weights, clipped = leftover_weights(LOGPS, MASK, "sequence_ratio", 0.9, REFERENCE)
    assert weights.flatten().tolist() == pytest.approx([1.648721270700, 1.0, 0.1], abs=1e-11)
    assert clipped.flatten().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("weighting", "advantages", "expected"),
    [
        ("sequence_ratio", [0.4, 0.0, 0.3], 2.248295027600),  # A-LoL
        ("none", [0.4, 0.0, 0.3], 1.833333333333),  # ref-free
        ("sequence_ratio", [0.9, 0.2, 0.8], 5.612830478767),  # R-LoL
        ("none", [0.9, 0.2, 0.8], (9 + 1.6 + 4) / 3),  # weighted behaviour cloning
        ("probability", [0.9, 0.2, 0.8], 0.1 * (9 + 1.6 + 4) / 3),  # R-GOLD, all below its lower bound
    ],
)
def test_losses(weighting, advantages, expected):
    found = loss(weighting, torch.tensor(advantages, dtype=torch.float64))
    assert float(found.mean()) == pytest.approx(expected, abs=1e-11)


def test_kl_adds_the_log_ratio():
    found = loss("none", leftover_advantages(REWARDS, VALUES)) + 0.1 * (LOGPS - REFERENCE).squeeze(1)
    assert float(found.mean()) == pytest.approx(1.75, abs=1e-11)


def test_gradient_passes_the_clip_and_not_the_weight():
    logps = LOGPS.clone().requires_grad_()
    found = loss("sequence_ratio", leftover_advantages(REWARDS, VALUES), logps)
    (grad,) = torch.autograd.grad(found.mean(), logps)
    assert grad.flatten().tolist() == pytest.approx([-0.219829502760, 0.0, -0.01], abs=1e-11)


def test_token_ratio():
    logps = torch.tensor([[-1.0, -2.0, -9.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.2, -0.5, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64).bool()
    advantages = torch.tensor([0.4], dtype=torch.float64)
    weights, clipped = leftover_weights(logps, mask, "token_ratio", 0.9, reference)
    assert weights[0, :2].tolist() == pytest.approx([1.221402758160, 0.223130160148], abs=1e-11)
    assert not clipped.any()
    assert float(loss("token_ratio", advantages, logps, reference, mask)) == pytest.approx(0.667065231383, abs=1e-11)
    assert float(loss("sequence_ratio", advantages, logps, reference, mask)) == pytest.approx(0.327038151641, abs=1e-11)


def test_probability_weights_of_likely_tokens():
    logps = torch.tensor([[0.5, 0.05]], dtype=torch.float64).log()
    weights, clipped = leftover_weights(logps, torch.ones_like(logps), "probability", 0.9)
    assert weights.tolist() == [[pytest.approx(0.5), 0.1]] and clipped.tolist() == [[False, True]]


def test_a_ratio_needs_a_reference():
    with pytest.raises(ValueError, match="reference"):
        leftover_weights(LOGPS, MASK, "token_ratio", 0.9)


def test_gradcheck():
    weights, _ = leftover_weights(LOGPS, MASK, "sequence_ratio", 0.9, REFERENCE)
    assert torch.autograd.gradcheck(
        lambda x: leftover_loss(x, MASK, weights, leftover_advantages(REWARDS, VALUES)),
        (LOGPS.clone().requires_grad_(),),
    )
