"""SOPHIA: the reward of a reasoning goes back to the description that it was made from (arXiv 2507.16814).

N rows, each a description c of the policy and a reasoning y of another model behind it.
"""

from __future__ import annotations

from posttrain.lazy import Tensor, torch
from posttrain.objectives.aggregation import masked
from posttrain.objectives.policy_gradient import per_token


def description_rewards(right: Tensor, known: Tensor, descriptions: Tensor) -> Tensor:
    """R(c) = (1/n) sum_j R(y_j), of each row's description.

    Args:
        right: (N,) bool, R(y) = 1.
        known: (N,) bool; False where nobody can say. Such rows are not among the n.
        descriptions: (N,) int; rows of one description share a number.

    Returns:
        (N,) float64; 0 where no row of the description is known.
    """
    same = (descriptions[:, None] == descriptions[None, :]) & known[None, :]
    return (same & right[None, :]).sum(dim=1).double() / same.sum(dim=1).clamp(min=1)


def propagated_rewards(right: Tensor, known: Tensor, lengths: Tensor, descriptions: Tensor, alpha_c: float) -> Tensor:
    """R(c, y), (N,) float: 1 for the shortest right reasoning of each description with R(c) > alpha_c, else 0.

    Of several that are as short the first is taken.

    Args:
        right, known, descriptions: as for `description_rewards`.
        lengths: (N,) tokens of description and reasoning.
    """
    candidates = right & known & (description_rewards(right, known, descriptions) > alpha_c)
    order = torch.arange(len(lengths), device=lengths.device)
    earlier = (lengths[None, :] < lengths[:, None]) | (
        (lengths[None, :] == lengths[:, None]) & (order[None, :] < order[:, None])
    )
    beaten = (candidates[None, :] & earlier & (descriptions[:, None] == descriptions[None, :])).any(dim=1)
    return (candidates & ~beaten).float()


def semi_off_policy_loss(logps: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """-R(c, y) log pi(c, y | I, x), (B,): whose gradient is the paper's, with its importance weight left out.

    Args:
        logps: (B, T) log-probs of the tokens of description and reasoning under the policy.
        rewards: (B,) R(c, y), or (B, T) with a weight for each token.
        mask: (B, T) bool.
    """
    return -masked(per_token(rewards, logps) * logps, mask).sum(dim=1)
