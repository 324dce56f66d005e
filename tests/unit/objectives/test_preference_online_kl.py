"""HyPO's online term: the surrogate's gradient is that of the reverse KL, with and without a baseline."""

import pytest
import torch

from posttrain.objectives.preference import online_kl_surrogate, online_kl_weights

ONE_GROUP = torch.tensor([4, 4])


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("leave_one_out", "weights", "surrogate", "gradient"),
    [(False, [0.5, -1.0], 1.75, [0.25, -0.5]), (True, [1.5, -1.5], 0.75, [0.75, -0.75])],
)
def test_surrogate(leave_one_out, weights, surrogate, gradient):
    logps, ref = t(-5.0, -6.0).requires_grad_(), t(-5.5, -5.0)
    found = online_kl_weights(logps, ref, ONE_GROUP, leave_one_out=leave_one_out)
    assert not found.requires_grad and found.tolist() == pytest.approx(weights)
    value = online_kl_surrogate(logps, found).mean()
    (grad,) = torch.autograd.grad(value, logps)
    assert float(value.detach()) == pytest.approx(surrogate)
    assert grad.tolist() == pytest.approx(gradient)
    assert float((logps.detach() - ref).mean()) == pytest.approx(-0.25)  # what is logged as the KL


def test_the_weights_are_constants_even_if_given_a_graph():
    logps = t(-5.0, -6.0).requires_grad_()
    attached = logps - t(-5.5, -5.0)
    (grad,) = torch.autograd.grad(online_kl_surrogate(logps, attached).mean(), logps)
    assert grad.tolist() == pytest.approx([0.25, -0.5])  # not [-2.25, -3.5]


THETA, REFERENCE = t(0.2, -0.1, 0.5), t(0.5, 0.3, 0.2)


def closed_form():
    theta = THETA.clone().requires_grad_()
    policy = theta.softmax(0)
    kl = (policy * (policy.log() - REFERENCE.log())).sum()
    return policy.detach(), kl.detach(), torch.autograd.grad(kl, theta)[0]


def test_over_all_answers_the_gradient_is_that_of_the_kl():
    policy, kl, expected = closed_form()
    assert float(kl) == pytest.approx(0.146507935783, abs=1e-11)
    assert expected.tolist() == pytest.approx([-0.188227666563, -0.088908746935, 0.277136413498], abs=1e-11)
    theta = THETA.clone().requires_grad_()
    logps = theta.log_softmax(0)
    weights = online_kl_weights(logps, REFERENCE.log(), torch.arange(3))
    (grad,) = torch.autograd.grad((policy * online_kl_surrogate(logps, weights)).sum(), theta)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-14)


def test_over_all_pairs_of_answers_the_baseline_changes_no_mean():
    policy, _, expected = closed_form()
    theta = THETA.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for first in range(3):
        for second in range(3):
            pair = torch.tensor([first, second])
            logps = theta.log_softmax(0)[pair]
            weights = online_kl_weights(logps, REFERENCE.log()[pair], torch.zeros(2, dtype=torch.long))
            total = total + policy[first] * policy[second] * online_kl_surrogate(logps, weights).mean()
    (grad,) = torch.autograd.grad(total, theta)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-14)


def test_groups():
    logps = t(-1.0, -2.0, -3.0, -4.0, -5.0, 0.1, 0.1, 0.1)
    groups = torch.tensor([7, 2, 7, 2, 9, 5, 5, 5])
    weights = online_kl_weights(logps, torch.zeros_like(logps), groups)
    # Two pairs, one alone (keeps its log-ratio), three alike (nothing to learn, exactly).
    assert weights.tolist() == pytest.approx([2.0, 2.0, -2.0, -2.0, -5.0, 0.0, 0.0, 0.0])
    assert weights[5:].tolist() == [0.0, 0.0, 0.0]


def test_at_the_reference_every_weight_is_0():
    logps = t(-1.0, -2.5, -3.0)
    for leave_one_out in (True, False):
        found = online_kl_weights(logps, logps, torch.tensor([0, 0, 1]), leave_one_out=leave_one_out)
        assert found.tolist() == [0.0, 0.0, 0.0]


def test_no_samples():
    empty = torch.zeros(0, dtype=torch.float64)
    assert online_kl_weights(empty, empty, torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_the_tabular_example_where_pairs_alone_drive_all_mass_to_the_unseen_answer():
    """Three answers share a linear feature (chosen 1, rejected 0, never seen 3); only the first two are labelled."""
    feature, reference = t(1.0, 0.0, 3.0), t(0.45, 0.45, 0.10)

    def trained(lam, steps=500):
        weight = t(0.0).requires_grad_()
        for _ in range(steps):
            logps = (reference.log() + weight * feature).log_softmax(0)
            ratio = logps - reference.log()
            offline = -torch.nn.functional.logsigmoid(0.1 * (ratio[0] - ratio[1]))
            weights = online_kl_weights(logps, reference.log(), torch.arange(3))
            online = (logps.detach().exp() * online_kl_surrogate(logps, weights)).sum()
            (grad,) = torch.autograd.grad(offline + lam * online, weight)
            weight = (weight - 1.0 * grad).detach().requires_grad_()
        policy = (reference.log() + weight.detach() * feature).softmax(0)
        return policy

    assert trained(0.0)[2] > 0.99
    assert trained(0.05).tolist() == pytest.approx([0.420, 0.212, 0.368], abs=2e-3)
    assert trained(0.2).tolist() == pytest.approx([0.466, 0.367, 0.167], abs=2e-3)
