"""OREO: the sheet's numbers and gradients, and zero loss at the optimum of a soft MDP that is solved exactly."""

import itertools

import pytest
import torch

from posttrain.methods.companions import DIVERGENCE
from posttrain.methods.oreo import OREO, OREOConfig
from posttrain.objectives.batch import TokenBatch
from posttrain.objectives.oreo import (
    by_step,
    one_step_losses,
    policy_losses,
    response_steps,
    token_steps,
    value_losses,
)
from posttrain.objectives.policy_gradient import kl_k3


def t(values):
    return torch.tensor(values, dtype=torch.float64)


RATIOS, VALUES, BETA = [0.2, -0.4, 0.1], [0.3, 0.6, 0.8], 0.5


def row(ratios, values, steps=None):
    """One row with these log-ratios; (steps, d with gradient, V with gradient)."""
    d, v = t([ratios]).requires_grad_(), t([values]).requires_grad_()
    mask = torch.ones_like(d, dtype=torch.bool)
    numbers = token_steps(mask) if steps is None else torch.tensor([steps])
    return by_step(d, torch.zeros_like(d), v, mask, numbers), d, v


def test_token_level_as_in_the_sheet():
    steps, d, v = row(RATIOS, VALUES)
    one, other = value_losses(steps, t([1.0]), BETA), policy_losses(steps, t([1.0]), BETA)
    assert one.item() == pytest.approx(0.2958333333) and other.item() == pytest.approx(0.2958333333)
    (grad_v,) = torch.autograd.grad(one.sum(), v, retain_graph=True)
    (grad_d,) = torch.autograd.grad(other.sum(), d)
    torch.testing.assert_close(grad_v, t([[-0.5, -0.3666666667, -0.1]]))
    torch.testing.assert_close(grad_d, t([[-0.25, -0.1833333333, -0.05]]))


def test_without_the_stop_gradient_earlier_residuals_would_add_up():
    _, d, v = row(RATIOS, VALUES)
    suffix = d.flip(1).cumsum(1).flip(1)
    ((v.detach() - 1 + BETA * suffix) ** 2).mean().backward()
    torch.testing.assert_close(d.grad, t([[-0.25, -0.4333333333, -0.4833333333]]))


@pytest.mark.parametrize("numbers", [None, [0, 0, 1], [0, 0, 0]], ids=["token", "step", "response"])
def test_each_loss_is_about_its_own_model(numbers):
    """The value loss has no gradient in the policy's log-probs, the policy's losses have none in the values."""
    steps, d, v = row(RATIOS, VALUES, numbers)
    rewards = t([1.0])
    assert gradients(value_losses(steps, rewards, BETA), d, v)[0] is None
    for objective in (policy_losses, one_step_losses):
        of_policy, of_values = gradients(objective(steps, rewards, BETA), d, v)
        assert of_policy.abs().min() > 0 and of_values is None


def gradients(losses, *of):
    """Gradients of the sum; None where it does not depend."""
    return torch.autograd.grad(losses.sum(), of, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize(
    ("steps", "loss", "gradient"),
    [([0, 0, 1], 0.2925, [-0.375, -0.375, -0.075]), ([0, 0, 0], 0.5625, [-0.75, -0.75, -0.75])],
    ids=["step", "response"],
)
def test_longer_actions_as_in_the_sheet(steps, loss, gradient):
    found, d, _ = row(RATIOS, VALUES, steps)
    policy = policy_losses(found, t([1.0]), BETA)
    assert policy.item() == pytest.approx(loss)
    (grad,) = torch.autograd.grad(policy.sum(), d)
    torch.testing.assert_close(grad, t([gradient]))


def test_mean_over_states_then_over_rows_and_the_regulariser():
    d, v = t([RATIOS, [0.3, -0.2, 0.0]]), t([VALUES, [0.5, 0.2, 0.0]])
    mask = t([[1, 1, 1], [1, 1, 0]]).bool()
    losses = policy_losses(by_step(d, torch.zeros_like(d), v, mask, token_steps(mask)), t([1.0, 0.0]), BETA)
    assert float(losses[1]) == pytest.approx(0.15625)
    assert float(losses.mean()) == pytest.approx(0.2260416667)
    k3 = kl_k3(t(1.0), t(1.0 - 0.3))  # the estimate at a log-ratio of 0.3
    assert float(k3) == pytest.approx(0.3 + t(-0.3).exp() - 1)


def test_one_step_of_the_equation_as_in_the_sheet():
    steps, d, _ = row(RATIOS, VALUES)
    loss = one_step_losses(steps, t([1.0]), BETA)
    assert loss.item() == pytest.approx(0.0741666667)
    (grad,) = torch.autograd.grad(loss.sum(), d)
    torch.testing.assert_close(grad, t([[-0.2, -0.4, -0.15]]) * 2 * BETA / 3)
    shorter = by_step(
        t([[0.2, -0.4, 9.0]]), t([[0.0] * 3]), t([[0.3, 0.6, 9.0]]), t([[1, 1, 0]]).bool(), torch.arange(3)[None]
    )
    expected = (0.3 - 0.6 + BETA * 0.2) ** 2 + (0.6 - 1.0 - BETA * 0.4) ** 2
    assert one_step_losses(shorter, t([1.0]), BETA).item() == pytest.approx(expected / 2)


def test_the_kl_over_the_vocabulary_as_in_the_sheet():
    """Two rows as above, the KL of [.7, .2, .1] from [.5, .3, .2] at every token, with weight 0.01."""
    p, reference = t([0.7, 0.2, 0.1]), t([0.5, 0.3, 0.2])
    kl = (p * (p / reference).log()).sum()
    assert kl.item() == pytest.approx(0.085122826)
    d, v = t([RATIOS, [0.3, -0.2, 0.0]]), t([VALUES, [0.5, 0.2, 0.0]])
    mask = t([[1, 1, 1], [1, 1, 0]]).bool()
    given = {"values": v, "rewards": t([1.0, 0.0]), "further": {DIVERGENCE: kl * mask}}
    batch = TokenBatch(mask, d, ref_logps=torch.zeros_like(d), **given)
    terms = OREO(OREOConfig(beta=BETA, kl_reg=0.01)).loss(batch)
    total = sum(float(terms[name].value) for name in ("policy", "kl")) / 2
    assert total == pytest.approx(0.2268928949)


def test_response_level_without_a_value_regresses_the_log_ratio_on_the_reward():
    d = t([RATIOS, [0.3, -0.2, 0.0]]).requires_grad_()
    mask, rewards = t([[1, 1, 1], [1, 1, 0]]).bool(), t([1.0, 0.0])
    steps = by_step(d, torch.zeros_like(d), torch.zeros_like(d), mask, response_steps(mask))
    found = policy_losses(steps, rewards, BETA)
    expected = (rewards - BETA * (d * mask).sum(1)) ** 2
    torch.testing.assert_close(found, expected)
    one, other = torch.autograd.grad(found.sum(), d, retain_graph=True)[0], torch.autograd.grad(expected.sum(), d)[0]
    torch.testing.assert_close(one, other)


def test_with_beta_towards_infinity_the_policy_stays_at_the_reference():
    """The residual per unit of beta: only d = 0 makes it small, whatever rewards and values are."""
    d = t([[0.2, -0.1, 0.3]]).requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    steps = by_step(d, torch.zeros_like(d), t([[5.0, -3.0, 1.0]]), mask, token_steps(mask))
    scaled = policy_losses(steps, t([1.0]), 1e9) / 1e18
    suffix = d.detach().flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(scaled, (suffix**2).mean(1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("level", ["token", "step", "response"])
def test_losses_are_zero_at_the_optimum_of_a_tabular_soft_mdp(level):
    """Three binary actions, a random reference and random terminal rewards, solved by backward induction."""
    beta, depth, generator = 0.5, 3, torch.Generator().manual_seed(0)
    rewards = {path: torch.rand((), generator=generator).double() for path in itertools.product((0, 1), repeat=depth)}
    states = [path for n in range(depth) for path in itertools.product((0, 1), repeat=n)]
    reference = {s: torch.rand(2, generator=generator).double().softmax(0) for s in states}
    values, policy = dict(rewards), {}
    for state in reversed(states):
        q = torch.stack([values[(*state, a)] for a in (0, 1)])
        values[state] = beta * (reference[state].log() + q / beta).logsumexp(0)
        policy[state] = (reference[state].log() + (q - values[state]) / beta).exp()
        assert float(policy[state].sum()) == pytest.approx(1.0)
    paths = list(rewards)
    logps = torch.stack([torch.stack([policy[p[:i]][p[i]].log() for i in range(depth)]) for p in paths])
    ref_logps = torch.stack([torch.stack([reference[p[:i]][p[i]].log() for i in range(depth)]) for p in paths])
    v = torch.stack([torch.stack([values[p[:i]] for i in range(depth)]) for p in paths])
    mask = torch.ones_like(logps, dtype=torch.bool)
    number = {
        "token": token_steps(mask),
        "step": torch.tensor([[0, 0, 1]]).expand(len(paths), -1),
        "response": response_steps(mask),
    }[level]
    found = by_step(logps, ref_logps, v, mask, number)
    of = torch.stack([rewards[p] for p in paths])
    assert float(value_losses(found, of, beta).max()) < 1e-24
    assert float(policy_losses(found, of, beta).max()) < 1e-24
    assert float(one_step_losses(found, of, beta).max()) < 1e-24


def test_the_fixed_point_of_the_sheet():
    reference, reward, beta = t([0.5, 0.5]), t([1.0, 0.0]), 0.5
    value = beta * (reference.log() + reward / beta).logsumexp(0)
    policy = (reference.log() + (reward - value) / beta).exp()
    assert float(value) == pytest.approx(0.7168904152)
    torch.testing.assert_close(policy, t([0.880797078, 0.119202922]))
    mask = torch.ones(2, 1, dtype=torch.bool)
    steps = by_step(policy.log()[:, None], reference.log()[:, None], value.expand(2, 1), mask, token_steps(mask))
    assert float(policy_losses(steps, reward, beta).max()) < 1e-20


def test_a_turn_of_somebody_else_is_no_action():
    d, v = t([[0.2, 9.0, -0.4, 0.1]]), t([[0.3, 9.0, 0.6, 0.8]])
    mask = t([[1, 0, 1, 1]]).bool()
    found = by_step(d, torch.zeros_like(d), v, mask, token_steps(mask))
    assert float(policy_losses(found, t([1.0]), BETA)) == pytest.approx(0.2958333333)
