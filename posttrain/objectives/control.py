"""Rewards of answers that are asked for levels of several qualities."""

from __future__ import annotations

from collections.abc import Sequence


def level_reward(scores: Sequence[float], levels: Sequence[float], weights: Sequence[float]) -> float:
    """1 - sum over d of w_d (R_d - l_d)^2 / sum over d of w_d, in [0, 1] for scores and levels in it.

    R_d is the score of a quality, l_d the level that was asked for. Largest where every level is met, unlike a sum of
    scores, which asks for as much of everything as there can be. The paper's objective (LDC, arXiv 2412.14626) is not
    public; this form is ours.

    Args:
        scores, levels, weights: one of each per quality; weights are not negative, and one is above 0.
    """
    if not len(scores) == len(levels) == len(weights):
        raise ValueError(f"{len(scores)} scores, {len(levels)} levels, {len(weights)} weights")
    gaps = [(score - level) ** 2 for score, level in zip(scores, levels, strict=True)]
    return 1 - sum(w * gap for w, gap in zip(weights, gaps, strict=True)) / sum(weights)
