"""DigiRL: which turns of recorded episodes are worth imitating (arXiv 2406.11896).

A critic V = sigmoid(logit) is the probability that an episode is solved from a state on. All (B, S), a column for each
turn: `values` of the state before it, `after` of the state behind it, 0 behind the last turn.
"""

from __future__ import annotations

from posttrain.lazy import Tensor, functional, torch
from posttrain.objectives.oreo import Steps
from posttrain.objectives.step_dapo import critic_losses


def terminal_rewards(outcomes: Tensor, exists: Tensor) -> Tensor:
    """The outcome (B,) as the reward of the last turn of each row, 0 elsewhere."""
    last = exists & ~functional.pad(exists[:, 1:], (0, 1), value=False)
    return torch.where(last, outcomes.unsqueeze(1), torch.zeros_like(outcomes).unsqueeze(1))


def values_after(values: Tensor, exists: Tensor) -> Tensor:
    """Of the state behind each turn: the next one's; 0 behind the last."""
    more = functional.pad(exists[:, 1:], (0, 1), value=False)
    return torch.where(more, functional.pad(values[:, 1:], (0, 1)), torch.zeros_like(values))


def code_gates(values: Tensor, after: Tensor, rewards: Tensor, returns: Tensor, margin: float) -> Tensor:
    """bool: V' - V - margin + r + MC > 0, the gate of the authors' code. MC, the return of what really followed, makes
    it pass nearly all turns of episodes that were solved."""
    return after - values - margin + rewards + returns > 0


def recalled_advantages(values: Tensor, after: Tensor, rewards: Tensor, exists: Tensor, lam: float) -> Tensor:
    """lambda^(H - t) r_H + (1 - lambda^(H - t)) (V' + r_t - V), t = 1 .. H, the doubly robust estimate of a turn.

    As it is remembered of the paper; neither the paper nor the code was at hand to compare it with.
    """
    horizon = exists.sum(dim=1, keepdim=True)
    left = horizon - 1 - torch.arange(exists.size(1), device=exists.device)
    weight = lam ** left.clamp(min=0).to(values.dtype)
    return weight * rewards.sum(dim=1, keepdim=True) + (1 - weight) * (after + rewards - values)


def recalled_gates(advantages: Tensor, exists: Tensor) -> Tensor:
    """bool: the estimate is above 1 / H. As remembered, too."""
    return advantages > 1 / exists.sum(dim=1, keepdim=True).clamp(min=1)


def both_state_losses(steps: Steps, outcomes: Tensor) -> Tensor:
    """Cross-entropy with the outcome of the state before a turn, and of that behind it where a turn follows.

    Both have the same label in the authors' code, so states in the middle count twice.
    """
    own = critic_losses(steps, outcomes)
    return own + values_after(own, steps.exists)


def imitation_losses(logps: Tensor, gates: Tensor) -> Tensor:
    """-gate * log-prob of the whole turn, elementwise. What is not worth imitating has no gradient at all."""
    return -(gates.to(logps.dtype) * logps)
