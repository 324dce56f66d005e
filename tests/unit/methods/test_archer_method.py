"""ArCHer: targets, losses and gradients by hand in float64, and which states the shell draws actions at."""

import math
from dataclasses import replace

import pytest
import torch

from posttrain.data.offline_rows import OfflineRow
from posttrain.data.sample import Origin, Sample
from posttrain.methods import METHODS
from posttrain.objectives.archer import (
    actor_losses,
    baseline_errors,
    expectile_errors,
    q_targets,
    squared_errors,
    turns_of,
    utterance_advantages,
    weighted_imitation,
)
from posttrain.objectives.batch import HEAD, TARGET, TokenBatch


def t(values):
    return torch.tensor(values, dtype=torch.float64)


EVERY = torch.ones(1, 3, dtype=torch.bool)
V_AFTER = t([[0.55, 0.7, 0]]), t([[0.6, 0.65, 0]])  # behind the last turn the episode is over


def test_targets_and_losses_of_the_critics():
    rewards = t([[0, 0, 1]])
    first, second = (q_targets(rewards, after, 0.95) for after in V_AFTER)
    torch.testing.assert_close(first, t([[0.5225, 0.665, 1]]))
    torch.testing.assert_close(second, t([[0.57, 0.6175, 1]]))
    q = t([[0.5, 0.6, 0.9]]).requires_grad_(), t([[0.4, 0.7, 0.8]]).requires_grad_()
    pairs = zip(q, (first, second), strict=True)
    loss = sum(squared_errors(value, target, EVERY).mean() for value, target in pairs)
    assert loss.item() == pytest.approx(0.0301458333)
    gradients = torch.autograd.grad(loss, q)
    torch.testing.assert_close(gradients[0], 2 * (q[0] - first).detach() / 3)
    v, aims = (t([[0.45, 0.6, 0.8]]), t([[0.48, 0.58, 0.9]])), (t([[0.52, 0.66, 0.85]]), t([[0.5, 0.61, 0.95]]))
    pairs = zip(v, aims, strict=True)
    assert sum(squared_errors(*pair, EVERY).mean() for pair in pairs).item() == pytest.approx(0.0049333333)


def test_the_smaller_of_both_targets():
    after = torch.minimum(*V_AFTER)
    torch.testing.assert_close(q_targets(t([[0, 0, 1]]), after, 0.95), t([[0.5225, 0.6175, 1]]))


def test_the_actor():
    q = t([0.55, 0.7, 0.8]).requires_grad_(), t([0.6, 0.62, 0.9])
    advantages = utterance_advantages(q, (t([0.45, 0.6, 0.8]), t([0.48, 0.58, 0.9])))
    torch.testing.assert_close(advantages, t([0.1, 0.04, 0]))
    assert not advantages.requires_grad
    logps = t([[-1, -2, 9], [-0.5, -0.5, -1], [-3, 9, 9]]).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    loss = actor_losses(logps, advantages, mask).mean()
    assert loss.item() == pytest.approx(0.1266666667)
    (gradient,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(gradient, -torch.where(mask, advantages.unsqueeze(1), t(0.0)) / 3)
    baseline = t([[0.05, 0.1, 9], [0, 0.02, 0.04], [0.1, 9, 9]])
    assert actor_losses(logps, advantages, mask, baseline).mean().item() == pytest.approx(-0.0733333333)
    assert (baseline_errors(baseline, advantages, mask).sum() / mask.sum()).item() == pytest.approx(0.0024166667)


def test_where_turns_begin_and_end():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    turns = turns_of(mask, torch.tensor([[0, 0, 0, 7, 1, 7], [0, 0, 0, 0, 0, 0], [5, 5, 5, 5, 5, 5]]))
    assert turns.exists.tolist() == [[True, True], [True, False], [False, False]]
    places = torch.arange(6).expand(3, 6)
    assert turns.before(places).tolist() == [[1, 4], [2, 0], [0, 0]]
    assert turns.at_end(places).tolist() == [[2, 4], [5, 0], [0, 0]]
    nothing = turns_of(mask[:0], torch.zeros(0, 6, dtype=torch.long))
    assert nothing.exists.shape == (0, 1)


def archer(**parameters):
    return METHODS["archer"](METHODS["archer"].Config(actor_freeze_steps=0, **parameters))


def batch():
    """A solved episode of two turns of two tokens with an observation between, and a fresh action of two tokens."""
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0]]).bool()
    steps = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    logps = t([[0, -1, -1, 9, -1, -1], [0, 0, 0, -1, -0.5, 9]]).requires_grad_()
    heads = t(
        [
            [[9, 9, 0.5, 9, 9, 0.9], [9, 9, 9, 9, 0.55, 9]],  # Q1, read before a turn's last token
            [[9, 9, 0.4, 9, 9, 0.8], [9, 9, 9, 9, 0.6, 9]],  # Q2
            [[9, 9, 9, 9, 9, 9], [9, 9, 9, 0.45, 9, 9]],  # V1, before its first one
            [[9, 9, 9, 9, 9, 9], [9, 9, 9, 0.48, 9, 9]],  # V2
        ]
    ).requires_grad_()
    target = t(
        [
            [[9, 9, 9, 9, 9, 9], [9, 9, 9, 9, 0.52, 9]],
            [[9, 9, 9, 9, 9, 9], [9, 9, 9, 9, 0.5, 9]],
            [[9, 9, 9, 9, 0.55, 9], [9, 9, 9, 9, 9, 9]],
            [[9, 9, 9, 9, 0.6, 9], [9, 9, 9, 9, 9, 9]],
        ]
    )
    further = {f"{HEAD}{n}": own for n, own in enumerate(heads)} | {f"{TARGET}{n}": own for n, own in enumerate(target)}
    expert = torch.tensor([True, False])
    made = TokenBatch(mask, logps, rewards=t([1, 1]), steps=steps, expert=expert, further=further)
    return made, logps, heads


def test_the_loss_by_hand():
    made, logps, heads = batch()
    terms = archer().loss(made)
    assert {name: (term.unit, int(term.count)) for name, term in terms.items()} == {
        "expert": ("steps", 2),
        "value": ("sequences", 1),
        "policy": ("sequences", 1),
    }
    # Q1 .5 and .9 against .5225 and 1, Q2 .4 and .8 against .57 and 1.
    assert terms["expert"].value.item() == pytest.approx(0.0225**2 + 0.1**2 + 0.17**2 + 0.2**2)
    assert terms["value"].value.item() == pytest.approx(0.07**2 + 0.02**2)
    assert terms["policy"].value.item() == pytest.approx(0.1 * 1.5)  # A = .55 - .45
    whole = sum(term.value for term in terms.values())
    of_policy, of_critic = torch.autograd.grad(whole, (logps, heads))
    torch.testing.assert_close(of_policy, t([[0] * 6, [0, 0, 0, -0.1, -0.1, 0]]))
    expected = torch.zeros_like(of_critic)
    expected[0, 0, 2], expected[0, 0, 5] = 2 * (0.5 - 0.5225), 2 * (0.9 - 1)
    expected[1, 0, 2], expected[1, 0, 5] = 2 * (0.4 - 0.57), 2 * (0.8 - 1)
    expected[2, 1, 3], expected[3, 1, 3] = 2 * (0.45 - 0.52), 2 * (0.48 - 0.5)
    torch.testing.assert_close(of_critic, expected)
    smaller = archer(target="smaller").loss(made)["expert"].value.item()
    assert smaller == pytest.approx(0.0225**2 + 0.1**2 + (0.4 - 0.5225) ** 2 + 0.2**2)


def test_an_action_that_was_cut_is_worth_nothing():
    made, _, _ = batch()
    terms = archer().loss(replace(made, rewards=t([1, 0])))
    assert terms["policy"].value.item() == pytest.approx(-0.45 * 1.5)  # A = 0 - .45
    assert terms["value"].value.item() == pytest.approx(0.45**2 + 0.48**2)
    assert terms["expert"].value.item() == pytest.approx(archer().loss(made)["expert"].value.item())


def test_the_critic_comes_first():
    made, _, _ = batch()
    method = METHODS["archer"](METHODS["archer"].Config(actor_freeze_steps=2))
    assert method.loss(made)["policy"].value.item() == 0
    method.begin_step(2)
    assert method.loss(made)["policy"].value.item() != 0


def test_states_of_a_row():
    row = OfflineRow(Sample([5, 6, 7, 8, 9, 4], [0, 1, 1, 0, 0, 1], Origin.EXPERT), 1.0)
    assert row.turn_starts == [1, 5]


def test_errors_below_and_above_weigh_differently():
    values = t([[0.5, 0.2, 9]]).requires_grad_()
    errors = expectile_errors(values, t([[0.7, 0.1, 0]]), torch.tensor([[True, True, False]]), 0.9)
    torch.testing.assert_close(errors, t([[0.9 * 0.04, 0.1 * 0.01, 0]]))
    (gradient,) = torch.autograd.grad(errors.sum(), values)
    torch.testing.assert_close(gradient, t([[-2 * 0.9 * 0.2, 2 * 0.1 * 0.1, 0]]))


def test_the_expectile_of_several_targets_is_where_weighted_errors_cancel():
    targets, exists = t([[0, 1, 1, 0]]), torch.ones(1, 4, dtype=torch.bool)
    value = t([[0.9] * 4]).requires_grad_()  # of 0 and 1 in equal shares the expectile e is e itself
    (gradient,) = torch.autograd.grad(expectile_errors(value, targets, exists, 0.9).sum(), value)
    assert gradient.sum().item() == pytest.approx(0)


def test_recorded_turns_are_imitated_by_their_advantage():
    logps = t([[-3, -2, 9]]).requires_grad_()
    losses = weighted_imitation(logps, t([[0.2, -0.5, 0]]), torch.tensor([[True, True, False]]), 2.0)
    torch.testing.assert_close(losses, t([[3 * math.exp(0.4), 2 * math.exp(-1), 0]]))
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    torch.testing.assert_close(gradient, t([[-math.exp(0.4), -math.exp(-1), 0]]))


def test_the_loss_of_recorded_actions_by_hand():
    """The solved episode of two turns of `batch()`, now with values of its states and the targets' Q of its turns."""
    made, _, _ = batch()
    made = replace(made.rows(slice(0, 1)), expert=None)
    logps, heads = made.logps.detach().requires_grad_(), torch.stack([made.further[f"{HEAD}{n}"] for n in range(4)])
    heads = heads.detach()
    heads[2, 0, [1, 4]], heads[3, 0, [1, 4]] = t([0.45, 0.6]), t([0.48, 0.5])
    heads = heads.requires_grad_()
    made.further[f"{TARGET}0"][0, [2, 5]], made.further[f"{TARGET}1"][0, [2, 5]] = t([0.5, 0.8]), t([0.4, 0.7])
    made = replace(made, logps=logps, further=made.further | {f"{HEAD}{n}": own for n, own in enumerate(heads)})
    method = archer(actions="recorded", inverse_temperature=2.0)
    assert method.needs.samples == 0
    terms = method.loss(made)
    assert {name: int(count) for name, count in method.counts(made).items()} == {"q": 2, "value": 2, "policy": 2}
    assert {(term.unit, int(term.count)) for term in terms.values()} == {("steps", 2)}
    assert terms["q"].value.item() == pytest.approx(0.0225**2 + 0.1**2 + 0.17**2 + 0.2**2)
    # V1 .45 and .6 against .5 and .8; V2 .48 and .5 against .4 (below) and .7.
    assert terms["value"].value.item() == pytest.approx(0.9 * (0.05**2 + 0.2**2 + 0.2**2) + 0.1 * 0.08**2)
    # A = min(.5, .4) - min(.45, .48) and min(.9, .8) - min(.6, .5); two tokens of -1 each.
    weights = math.exp(2 * -0.05), math.exp(2 * 0.3)
    assert terms["policy"].value.item() == pytest.approx(2 * sum(weights))
    of_policy, of_critic = torch.autograd.grad(sum(term.value for term in terms.values()), (logps, heads))
    expected = t([[0, -weights[0], -weights[0], 0, -weights[1], -weights[1]]])
    torch.testing.assert_close(of_policy, expected)
    assert of_critic[2, 0, 1].item() == pytest.approx(-2 * 0.9 * 0.05)
    assert of_critic[3, 0, 1].item() == pytest.approx(2 * 0.1 * 0.08)


@pytest.mark.parametrize("idle", [{"actions": "recorded", "token_baseline": True}, {"expectile": 0.7}])
def test_what_the_actions_do_not_use_is_refused(idle):
    with pytest.raises(ValueError, match="no effect with actions"):
        archer(**idle)
