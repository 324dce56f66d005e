"""Rewards that ask for search beside being right, filters that such rewards must not decide (arXiv 2502.06773), and the
entropy as an advantage."""

from __future__ import annotations

from posttrain.lazy import Tensor, torch
from posttrain.objectives.advantages import group_statistics


def search_reward(
    outcomes: Tensor, unanswered: Tensor, lengths: Tensor, no_answer: float, length_cost: float
) -> Tensor:
    """outcome - no_answer [no answer was found] - length_cost / length, (N,).

    The last term punishes short completions, and hardly long ones. The authors' code measures the length as a quarter
    of the characters before the first box; here it is what the caller counts.

    Args:
        outcomes, lengths: (N,); unanswered: (N,) bool; lengths below 1 count as 1.
    """
    return outcomes - no_answer * unanswered.to(outcomes) - length_cost / lengths.to(outcomes).clamp(min=1)


def groups_that_differ(outcomes: Tensor, groups: Tensor, known: Tensor) -> Tensor:
    """Bool (N,): rows of groups whose known outcomes are not all equal."""
    _, deviations, _ = group_statistics(outcomes, groups, known)
    return known & (deviations > 0)


def mixed_reward(search: Tensor, exploration: Tensor, alpha: float) -> Tensor:
    """alpha search + (1 - alpha) exploration, (N,)."""
    return torch.lerp(exploration, search, alpha)


def entropy_advantages(logps: Tensor, entropies: Tensor) -> Tensor:
    """-(log q(y_t) + H_t), (B, T), without gradient: how much rarer a token is than tokens are on average there.

    For y ~ q, E[-(log q(y) + H) d log q(y)] = dH: its policy gradient is that of the entropy bonus, at the states of
    the samples. The mean over tokens is 0 in every state, so it is centred as the advantages of groups are.

    Args:
        logps: (B, T) log q of the samples; entropies: (B, T) H of the distributions they were drawn from, in nats.
    """
    return -(logps + entropies).detach()
