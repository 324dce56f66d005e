"""Losses on rows that an expert wrote, inside on-policy training; pure functions of log-probs.

l = log-prob of a token under the current policy, p = exp(l), sg = no gradient; tensors (B, T) aligned to tokens.
"""

from __future__ import annotations

import math
from typing import Literal

from posttrain.lazy import Tensor, torch

Phi = Literal["uncertainty", "probability", "none"]


def expert_weight(logps: Tensor, phi: Phi) -> Tensor:
    """CHORD's weight of expert tokens, without gradient (arXiv 2508.11408, section 4).

    - `uncertainty`: p (1 - p), eq. 6. Small where a token is certain and where it is all but impossible.
    - `probability`: p, the importance weight of an expert whose own probabilities are taken as 1.
    - `none`: 1.

    The paper prints eq. 6 without a stop-gradient, its code has one. With a gradient, tokens above p = 1/2 would be
    pushed down.
    """
    p = logps.detach().exp()
    return {"uncertainty": p * (1 - p), "probability": p, "none": torch.ones_like(p)}[phi]


def expert_nll(logps: Tensor, weights: Tensor, cutoff: float = 1.0) -> Tensor:
    """-w min(l, log cutoff), (B, T). A token likelier than `cutoff` keeps a value and loses its gradient; 1 is off.

    Args:
        weights: (B, T) or (B, 1), without gradient; from the log-probs before the clamp.
    """
    return -weights * (logps if cutoff >= 1.0 else logps.clamp(max=math.log(cutoff)))


def mixing_weight(step: int, warmup: int, decay: int, peak: float, valley: float) -> float:
    """CHORD's weight mu of the expert part at optimizer step `step`, from 0: up to `peak` linearly over `warmup` steps,
    down to `valley` along a cosine over `decay` steps, and `valley` from then on (arXiv 2508.11408, section 3)."""
    if step < warmup:
        return step / warmup * peak
    if step >= warmup + decay:
        return valley
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))


def entropy_ratio(change_expert: float, change_policy: float, bound: float, eps: float = 1e-8) -> float:
    """Recall-Extend Dynamics: |change of entropy by imitation| / |change by reinforcement|, in [1, bound].

    Args:
        change_expert, change_policy: nats per token and step, averaged over steps.
        bound: G.
        eps: added to the divisor.
    """
    return min(max(abs(change_expert) / (abs(change_policy) + eps), 1.0), bound)


def accuracy_factor(accuracy: Tensor, bound: float) -> Tensor:
    """G^(1 - 2 accuracy), in [1/G, G]: problems that the policy fails are imitated more, those it solves less."""
    return bound ** (1 - 2 * accuracy)


def recall_extend_weight(ratio: float, accuracy: Tensor, bound: float) -> Tensor:
    """Weight of imitation: entropy ratio times accuracy factor, in [1, G^2]."""
    return (ratio * accuracy_factor(accuracy, bound)).clamp(1.0, bound**2)


def accuracy_shift(logps: Tensor, accuracy: Tensor) -> Tensor:
    """p^(1 - accuracy), without gradient: the importance ratio of expert tokens whose unknown author is taken to have
    the probability p^accuracy. 1 where the policy solves the problem, p where it never does.

    Args:
        logps: (B, T).
        accuracy: broadcasts against them.
    """
    return ((1 - accuracy) * logps.detach()).exp()
