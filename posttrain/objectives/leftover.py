"""A-LoL: offline policy gradient on completions that are better than expected (arXiv 2305.14718)."""

from __future__ import annotations

from typing import Literal

from posttrain.lazy import Tensor, torch
from posttrain.objectives.aggregation import masked
from posttrain.objectives.policy_gradient import bounded

Weighting = Literal["sequence_ratio", "token_ratio", "none", "probability"]

MIN_PROBABILITY = 0.1
"""Lower bound of GOLD's token weight (authors' code)."""


def leftover_advantages(rewards: Tensor, values: Tensor) -> Tensor:
    """max(R - V, 0), (B,): what is worse than the reference policy's value is left out."""
    return (rewards - values).clamp(min=0)


def leftover_weights(
    logps: Tensor, mask: Tensor, weighting: Weighting, epsilon: float, ref_logps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Detached importance weights, (B, T), and bool (B, T) where they were clipped.

    - `sequence_ratio`: clip(pi(y|x) / pi_ref(y|x), 1 - e, 1 + e), the same at every token (A-LoL, R-LoL).
    - `token_ratio`: the ratio of each token, clipped (A-LoL seq).
    - `none`: 1 (A-LoL ref-free, A-LoL KL, weighted behaviour cloning).
    - `probability`: max(pi(token), 0.1) (R-GOLD).

    The clip is a plain clamp, without PPO's minimum: a clipped sequence keeps its gradient.

    Args:
        logps, mask, ref_logps: (B, T).
    """
    if weighting == "none":
        return torch.ones_like(logps), torch.zeros_like(logps, dtype=torch.bool)
    if weighting == "probability":
        probability = logps.detach().exp()
        return probability.clamp(min=MIN_PROBABILITY), probability < MIN_PROBABILITY
    if ref_logps is None:
        raise ValueError(f"weighting {weighting} needs reference log-probs")
    log_ratio = masked(logps.detach() - ref_logps, mask)
    if weighting == "sequence_ratio":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(logps)
    low, high = 1 - epsilon, 1 + epsilon
    ratio = bounded(log_ratio).exp()
    return ratio.clamp(low, high), (ratio < low) | (ratio > high)


def leftover_loss(logps: Tensor, mask: Tensor, weights: Tensor, advantages: Tensor) -> Tensor:
    """-A sum_t w_t log pi(token t), (B,); a sum over tokens, not a mean.

    Args:
        logps, mask, weights: (B, T); advantages: (B,).
    """
    return -advantages * masked(weights.detach() * logps, mask).sum(dim=1)
