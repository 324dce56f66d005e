"""Group-relative REINFORCE on data of any origin: clip, weight, regularise, drop (arXiv 2509.24203).

The loss of a token is -w M A l plus a regulariser, with w and M without gradient. The paper's family is made by
choosing them apart from each other. Notation as in `policy_gradient`: l log-prob under the current policy, l_old under
the one that sampled, rho = exp(l - l_old), A advantage; all (B, T) aligned to tokens, A (B,) or (B, T).
"""

from __future__ import annotations

from typing import Literal

from posttrain.lazy import Tensor, torch
from posttrain.objectives.aggregation import masked
from posttrain.objectives.policy_gradient import per_token

Clip = Literal["none", "one_side", "two_side", "ring", "sequence_one_side"]
Weight = Literal["none", "importance", "sequence_importance", "advantage"]


def rec_mask(
    ratio: Tensor,
    advantages: Tensor,
    clip: Clip,
    epsilon_low: float,
    epsilon_high: float,
    epsilon_low_prime: float = 0.6,
    epsilon_high_prime: float = 2.0,
) -> Tensor:
    """M: bool (B, T), False where a token is clipped, that is, loses its gradient.

    - `one_side`, and `sequence_one_side` for a ratio of whole sequences:
      (A >= 0 and rho <= 1 + e_high) or (A <= 0 and rho >= 1 - e_low). PPO's clip has the same gradient.
    - `two_side`: 1 - e_low <= rho <= 1 + e_high.
    - `ring`: two_side, or (A >= 0 and rho <= 1 - e_low') or (A <= 0 and rho >= 1 + e_high').
    - `none`: all.

    Args:
        ratio: (B, T); its gradient is not looked at.
    """
    ratio, advantages = ratio.detach(), per_token(advantages, ratio)
    positive, negative = advantages >= 0, advantages <= 0
    if clip == "none":
        return torch.ones_like(ratio, dtype=torch.bool)
    if clip in ("one_side", "sequence_one_side"):
        return (positive & (ratio <= 1 + epsilon_high)) | (negative & (ratio >= 1 - epsilon_low))
    within = (ratio >= 1 - epsilon_low) & (ratio <= 1 + epsilon_high)
    if clip == "two_side":
        return within
    low, high = ratio <= 1 - epsilon_low_prime, ratio >= 1 + epsilon_high_prime
    return within | (positive & low) | (negative & high)


def rec_weight(ratio: Tensor, advantages: Tensor, weight: Weight, temperature: float = 1.0) -> Tensor:
    """w: (B, T), without gradient.

    `none`: 1. `importance`, `sequence_importance`: the ratio given. `advantage`: exp(A / temperature) (RED-Weight).
    """
    if weight == "none":
        return torch.ones_like(ratio)
    if weight == "advantage":
        return (per_token(advantages, ratio) / temperature).exp().detach()
    return ratio.detach()


def weighted_reinforce(logps: Tensor, advantages: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """-w M A l per token, (B, T). Clipped tokens give 0 and still count where losses are averaged.

    Args:
        weights: w, (B, T); kept: M, bool (B, T).
    """
    return masked(-weights * per_token(advantages, logps) * logps, kept)


def token_square(logps: Tensor, old_logps: Tensor | None) -> Tensor:
    """(l - l_old)^2 per token, (B, T): the k2 regulariser, its 1/2 left to the coefficient. 0 on-policy.

    Args:
        old_logps: None when the sampling policy is the current one.
    """
    return (logps - (logps.detach() if old_logps is None else old_logps)) ** 2


def mirror_descent(logps: Tensor, old_logps: Tensor | None, advantages: Tensor, mask: Tensor, tau: float) -> Tensor:
    """Kimi's mirror descent per row, (B,): -A L + tau / 2 (L - L_old)^2 with L the sum of l over a row's tokens.

    Its gradient is that of arXiv 2501.12599, eq. 3. At the optimum of a row L - L_old = A / tau, of any length.

    Args:
        logps, mask: (B, T); advantages: (B,) or (B, T).
        old_logps: (B, T), or None when the sampling policy is the current one.
    """
    difference = masked(logps - (logps.detach() if old_logps is None else old_logps), mask).sum(dim=1)
    raised = masked(per_token(advantages, logps) * logps, mask).sum(dim=1)
    return tau / 2 * difference**2 - raised


def log_mean_exp_baseline(rewards: Tensor, groups: Tensor, known: Tensor, tau: float) -> Tensor:
    """tau log mean_group exp(r / tau), (N,): the value of a group under mirror descent with temperature tau.

    Between the group's mean (tau large) and its maximum (tau small). 0 for groups without a known row.

    Args:
        rewards: (N,); groups: (N,) non-negative int; known: (N,) bool, the rows that enter.
    """
    n_groups = int(groups.max()) + 1 if groups.numel() else 0
    zeros = rewards.new_zeros(n_groups)
    sizes = zeros.index_add(0, groups, known.to(rewards.dtype))
    highest = zeros.scatter_reduce(0, groups[known], rewards[known], "amax", include_self=False)
    above = torch.where(known, ((rewards - highest[groups]) / tau).exp(), torch.zeros_like(rewards))
    sums = zeros.index_add(0, groups, above)
    values = highest + tau * (sums / sizes.clamp(min=1)).clamp(min=torch.finfo(rewards.dtype).tiny).log()
    return torch.where(sizes > 0, values, torch.zeros_like(values))[groups]


def balanced_rows(rewards: Tensor, groups: Tensor, known: Tensor, draws: Tensor) -> Tensor:
    """Bool (N,): the rows that RED-Drop keeps. In a group with more negatives than positives the surplus is dropped.

    Positive are known rows with r >= the group's mean, negative the other known ones; those with the smallest draws
    are dropped. Rows that are not known are never kept.

    Args:
        rewards, draws: (N,); groups: (N,) int; known: (N,) bool.
    """
    kept = known.clone()
    for group in groups[known].unique().tolist():
        rows = torch.nonzero(known & (groups == group)).squeeze(1)
        # With equal rewards a rounded mean may lie above all of them.
        centred = rewards[rows] - rewards[rows].min()
        positive = centred >= centred.mean()
        negatives = rows[~positive]
        surplus = int((~positive).sum() - positive.sum())
        if surplus > 0:
            kept[negatives[draws[negatives].argsort(stable=True)[:surplus]]] = False
    return kept
