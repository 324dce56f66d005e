"""Advantages of semi-online RL: episodes along recorded ones, in which some turns differ from the expert's.

Source: UI-S1, arXiv 2509.11543, and the authors' code, which differ where a turn does not match and in what an episode
is compared by; both are here.
"""

from __future__ import annotations

from typing import Literal

from posttrain.lazy import Tensor, torch
from posttrain.objectives.advantages import group_advantages
from posttrain.objectives.turns import turn_advantages

EPS = 1e-6


def segment_returns(rewards: Tensor, matches: Tensor, discount: float, rule: Literal["code", "paper"]) -> Tensor:
    """G_k = r_k + discount * G_(k+1) within a stretch of turns that match, (N, K).

    The turn that does not match ends the stretch and keeps its own reward. `paper` counts that reward for the turns
    before it; `code` does not: there the sum begins anew in front of it.

    Args:
        rewards: (N, K), 0 behind the last turn of a row.
        matches: (N, K) bool.
    """
    returns, carry = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for turn in reversed(range(rewards.size(1))):
        match = matches[:, turn]
        own = rewards[:, turn]
        returns[:, turn] = torch.where(match, own + discount * carry, own)
        carry = torch.where(match, returns[:, turn], own if rule == "paper" else torch.zeros_like(own))
    return returns


def step_advantages(
    returns: Tensor, turns: Tensor, groups: Tensor, known: Tensor, scale: Literal["group", "none"]
) -> Tensor:
    """A_S, (N, K): returns against those of the same turn of the same problem. A turn that one alone reached gets 0."""
    return turn_advantages(returns, turns, groups, known, baseline="mean", scale=scale, eps=EPS)


def episode_advantages(
    rewards: Tensor,
    turns: Tensor,
    groups: Tensor,
    known: Tensor,
    scale: Literal["group", "none"],
    of: Literal["return", "pooled_steps"],
) -> Tensor:
    """A_E, (N, K): how good an episode is, on all of its turns; 0 behind the last.

    Args:
        rewards: (N, K), 0 behind the last turn of a row.
        of: `return`: the sum of an episode's rewards against those of its problem (paper); `pooled_steps`: each turn's
            own reward against those of all turns of the problem (the authors' code).
    """
    rows, width = rewards.shape
    reached = (torch.arange(width, device=rewards.device) < turns.unsqueeze(1)) & known.unsqueeze(1)
    if of == "return":
        whole = group_advantages(rewards.sum(dim=1), groups, known, scale=scale, eps=EPS)
        return torch.where(reached, whole.unsqueeze(1), torch.zeros_like(rewards))
    flat = groups.unsqueeze(1).expand(rows, width)
    pooled = group_advantages(rewards.flatten(), flat.flatten(), reached.flatten(), scale=scale, eps=EPS)
    return pooled.view(rows, width)


def semi_online_performance(right: list[int], turns: list[int]) -> tuple[float, float, float]:
    """SOP: progress (mean of s / t), share of tasks without an error, and the mean of both.

    Args:
        right: s, actions before the first error.
        turns: t, actions of the expert.
    """
    progress = sum(s / t for s, t in zip(right, turns, strict=True)) / len(turns)
    solved = sum(s == t for s, t in zip(right, turns, strict=True)) / len(turns)
    return progress, solved, (progress + solved) / 2
