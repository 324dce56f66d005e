"""Step-level DAPO as the shell runs it: loss and gradient of the policy phase on hand-made batches."""

import dataclasses

import pytest
import torch

from posttrain.methods import METHODS
from posttrain.objectives.batch import TokenBatch


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def policy_phase(**parameters):
    return METHODS["dapo_step"](METHODS["dapo_step"].Config(phase="policy", **parameters))


def four_actions():
    """The sheet's four actions of one state, of three tokens each; (batch, log-probs, values).

    The state is worth 0.5. No step follows, so that the outcomes stand for V of the state behind an action.
    """
    ratios = t([[0.2, -0.1, 0.3], [0, 0.4, -0.2], [0.5, 0.5, 0], [-0.3, 0.1, 0.1]])
    reference = torch.full_like(ratios, -1.5)
    logps, values = (reference + ratios).requires_grad_(), torch.zeros_like(ratios).requires_grad_()
    further = {"rewards": t([0.25, 0.5, 0.75, 0.5]), "steps": torch.zeros(4, 3, dtype=torch.long)}
    return (
        TokenBatch(torch.ones_like(ratios).bool(), logps, ref_logps=reference, values=values, **further),
        logps,
        values,
    )


def test_policy_as_in_the_sheet():
    batch, logps, values = four_actions()
    policy = policy_phase(beta=0.1).loss(batch)["policy"]
    assert (policy.unit, float(policy.count)) == ("steps", 4)
    mean = policy.value / policy.count
    assert mean.item() == pytest.approx(1.33875)
    of_policy, of_values = torch.autograd.grad(mean, (logps, values), allow_unused=True)
    torch.testing.assert_close(of_policy, t([[0.725], [0.05], [-0.375], [-0.025]]).expand(4, 3))
    assert of_values is None


def test_small_advantages_are_left_out_of_the_loss_and_stay_in_the_count():
    batch, logps, _ = four_actions()
    policy = policy_phase(beta=0.1, min_advantage=0.1).loss(batch)["policy"]
    assert policy.value.item() == pytest.approx(0.5 * (2.9**2 + 1.5**2)) and float(policy.count) == 4
    (grad,) = torch.autograd.grad(policy.value, logps)
    torch.testing.assert_close(grad, t([[2.9], [0.0], [-1.5], [0.0]]).expand(4, 3))


def test_several_steps_by_hand():
    """A right row of steps {0, 1}, {2} with V = .5, .75, and a wrong one of two with V = .6, .2; beta 0.1.

    Advantages .25, .25 and -.4, -.2; targets 2.5, 2.5 and -4, -2; log-ratios .1, .3 and .4, -.5.
    """
    mask, reference = t([[1, 1, 1], [1, 1, 0]]).bool(), t([[-1.0, -0.5, -2.0], [-0.7, -1.5, 9.0]])
    logps = (reference + t([[0.2, -0.1, 0.3], [0.4, -0.5, 9.0]])).requires_grad_()
    values = t([[0.5, 0.1, 0.75], [0.6, 0.2, 0.9]]).logit()
    further = {"rewards": t([1.0, 0.0]), "steps": torch.tensor([[0, 0, 1], [0, 1, 7]])}
    batch = TokenBatch(mask, logps, ref_logps=reference, values=values, **further)
    policy = policy_phase(beta=0.1).loss(batch)["policy"]
    assert policy.value.item() == pytest.approx(0.5 * (2.4**2 + 2.2**2 + 4.4**2 + 1.5**2)) and float(policy.count) == 4
    (grad,) = torch.autograd.grad(policy.value, logps)
    torch.testing.assert_close(grad, t([[-2.4, -2.4, -2.2], [4.4, 1.5, 0.0]]))


def test_the_loss_is_zero_at_the_reference_tilted_by_the_advantages():
    batch, logps, _ = four_actions()
    tilt = t([[-0.25], [0.0], [0.25], [0.0]]) / 0.1 / 3  # shared out over the tokens of an action
    tilted = (batch.ref_logps + tilt).requires_grad_()
    policy = policy_phase(beta=0.1).loss(dataclasses.replace(batch, logps=tilted))["policy"]
    assert policy.value.item() < 1e-24
    assert torch.autograd.grad(policy.value, tilted)[0].abs().max() < 1e-12


def test_with_beta_towards_infinity_it_pulls_back_to_the_reference_whatever_the_rewards():
    batch, logps, _ = four_actions()
    method, sums = policy_phase(beta=1e15), (logps - batch.ref_logps).sum(1)
    expected = 0.5 * (sums**2).sum()
    for rewards in (batch.rewards, 1 - batch.rewards):
        found = method.loss(dataclasses.replace(batch, rewards=rewards))["policy"].value
        torch.testing.assert_close(found, expected)
        one, other = (torch.autograd.grad(loss, logps, retain_graph=True)[0] for loss in (found, expected))
        torch.testing.assert_close(one, other)
