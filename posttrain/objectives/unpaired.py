"""Losses of single completions that are good or bad. Pure functions of log-ratios; minimised. All (B,).

Notation: u = log pi(y|x) - log pi_ref(y|x), summed over the completion; good rows have the label True. The reference
point is a number of the whole step, without gradient: what it is made of is the method's.
"""

from __future__ import annotations

from posttrain.lazy import Tensor, functional, torch
from posttrain.objectives.preference import same_shape


def kto_loss(
    log_ratios: Tensor, good: Tensor, reference_point: float, beta: float, desirable: float, undesirable: float
) -> Tensor:
    """Of a good row w_D (1 - sigmoid(beta (u - z0))), of a bad one w_U (1 - sigmoid(beta (z0 - u))), (B,).

    KTO, arXiv 2402.01306. The gradient vanishes on both sides: rows that are far from z0, hard ones and wrongly
    labelled ones among them, are let be.

    Args:
        log_ratios: u.
        good: bool.
        reference_point: z0, the KL of the policy from the reference, at least 0.
        beta: how steep a row's value is around z0.
        desirable, undesirable: w_D and w_U, weights of good and bad rows.
    """
    same_shape(1, log_ratios=log_ratios, good=good)
    gains = beta * (log_ratios - reference_point)
    # 1 - sigmoid(z) = sigmoid(-z) keeps its digits where sigmoid(z) rounds to 1.
    return torch.where(good, desirable * torch.sigmoid(-gains), undesirable * torch.sigmoid(gains))


def bco_loss(log_ratios: Tensor, good: Tensor, shift: float, beta: float) -> Tensor:
    """-log sigmoid(beta u - delta) of a good row, -log sigmoid(delta - beta u) of a bad one, (B,).

    BCO, arXiv 2404.04656: logistic regression of the label on the implicit reward beta u.

    Args:
        log_ratios: u.
        good: bool.
        shift: delta, the mean reward of all rows seen so far.
        beta: scale of the reward.
    """
    same_shape(1, log_ratios=log_ratios, good=good)
    logits = beta * log_ratios - shift
    return -functional.logsigmoid(torch.where(good, logits, -logits))
