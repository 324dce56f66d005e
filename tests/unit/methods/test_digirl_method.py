"""DigiRL: gates by hand in float64, and the loss of the method on a hand-made batch."""

import pytest
import torch

from posttrain.methods import METHODS
from posttrain.objectives.batch import TokenBatch
from posttrain.objectives.digirl import (
    code_gates,
    imitation_losses,
    recalled_advantages,
    recalled_gates,
    terminal_rewards,
    values_after,
)
from posttrain.objectives.turns import returns_to_go


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def test_gates_of_the_code():
    """The values behind the turns are the sheet's own, not those of the next turns."""
    rewards = t([[0, 0, 0, 1]])
    returns = returns_to_go(rewards, 0.5)
    torch.testing.assert_close(returns, t([[0.125, 0.25, 0.5, 1]]))
    gates = code_gates(t([[0.3, 0.6, 0.9, 0.95]]), t([[0.5, 0.62, 0.2, 0]]), rewards, returns, 0.05)
    assert gates.tolist() == [[True, True, False, True]]
    nothing = torch.zeros(1, 3, dtype=torch.float64)
    gates = code_gates(t([[0.3, 0.45, 0.4]]), t([[0.45, 0.4, 0]]), nothing, nothing, 0.05)
    assert gates.tolist() == [[True, False, False]]
    losses = imitation_losses(t([[-2, -1, -3]]), gates)
    assert losses.mean().item() == pytest.approx(2 / 3)


def test_the_recalled_estimate():
    exists = torch.ones(1, 4, dtype=torch.bool)
    rewards = terminal_rewards(t([1.0]), exists)
    found = recalled_advantages(t([[0.3, 0.6, 0.9, 0.95]]), t([[0.5, 0.62, 0.2, 0]]), rewards, exists, 0.5)
    torch.testing.assert_close(found, t([[0.3, 0.265, 0.15, 1]]))
    assert recalled_gates(found, exists).tolist() == [[True, True, False, True]]


def test_what_is_behind_the_last_turn():
    exists = torch.tensor([[True, True, False], [True, False, False]])
    assert values_after(t([[0.2, 0.3, 9], [0.4, 9, 9]]), exists).tolist() == [[0.3, 0, 0], [0, 0, 0]]
    assert terminal_rewards(t([1, 1]), exists).tolist() == [[0, 1, 0], [1, 0, 0]]


def rows():
    """A solved episode of turns of one and two tokens, an observation between, and one of one turn that failed."""
    mask = t([[1, 0, 1, 1], [1, 1, 0, 0]]).bool()
    logps = t([[-1, 9, -2, -0.5], [-3, -1, 0, 0]]).requires_grad_()
    values = t([[0, 9, 2, 9], [-1, 9, 0, 0]]).requires_grad_()
    steps = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    return TokenBatch(mask, logps, values=values, rewards=t([1, 0]), steps=steps), logps, values


def digirl(**parameters):
    return METHODS["digirl"](METHODS["digirl"].Config(actor_freeze_steps=0, **parameters))


def test_the_loss_by_hand():
    """V = .5, .88 and .27; turns pass by V' - V - .05 + r + MC: .83, 1.07 and -.32."""
    batch, logps, values = rows()
    terms = digirl().loss(batch)
    assert {(term.unit, float(term.count)) for term in terms.values()} == {("steps", 3)}
    assert terms["policy"].value.item() == pytest.approx(1 + 2 + 0.5)
    (gradient,) = torch.autograd.grad(terms["policy"].value, logps, retain_graph=True)
    torch.testing.assert_close(gradient, t([[-1, 0, -1, -1], [0, 0, 0, 0]]))
    # Every state has the outcome for its label; the one between two turns counts twice.
    p = t([0, 2, -1]).sigmoid()
    expected = -p[0].log() - 2 * p[1].log() - (1 - p[2]).log()
    assert terms["value"].value.item() == pytest.approx(expected.item())
    (gradient,) = torch.autograd.grad(terms["value"].value, values)
    torch.testing.assert_close(gradient, t([[p[0] - 1, 0, 2 * (p[1] - 1), 0], [p[2], 0, 0, 0]]))
    # V of the first prompt is .5, which the outcome exceeds by .5.
    assert digirl(instruction_margin=0.49).loss(batch)["policy"].value.item() == pytest.approx(3.5)
    assert digirl(instruction_margin=0.51).loss(batch)["policy"].value.item() == 0


def test_the_critic_comes_first():
    batch, _, _ = rows()
    method = METHODS["digirl"](METHODS["digirl"].Config(actor_freeze_steps=2))
    method.begin_step(1)
    assert method.loss(batch)["policy"].value.item() == 0
    method.begin_step(2)
    assert method.loss(batch)["policy"].value.item() == pytest.approx(3.5)


def test_the_curriculum_follows_the_share():
    batch, _, _ = rows()
    method = digirl(curriculum_share=0.25, curriculum_rate=0.4)
    terms = method.loss(batch)
    # The outcome exceeds V of the prompt by .5 and by -.27.
    share, n = terms["policy"].diagnostics["digirl/curriculum"]
    assert (float(share), float(n)) == (1, 2)
    method.end_step({"digirl/curriculum": 0.5})
    assert method.margin == pytest.approx(0.4 * 0.25)
    again = digirl(curriculum_share=0.25, curriculum_rate=0.4)
    again.load_state_dict(method.state_dict())
    assert again.margin == method.margin
    for _ in range(5):
        method.end_step({"digirl/curriculum": 0.5})
    assert method.loss(batch)["policy"].value.item() == 0
    with pytest.raises(ValueError, match="without curriculum_share"):
        digirl(curriculum_rate=0.5)
