"""Losses and aggregates of process reward models, and advantages, from one score per step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from posttrain.lazy import Tensor, functional, torch

Aggregate = Literal["min", "product", "last", "mean"]


def step_losses(scores: Tensor, right: Tensor) -> Tensor:
    """-log sigmoid(s) of a right step, -log sigmoid(-s) of a wrong one, of the shape of `scores`.

    The score is the logit of "this step is right" (process supervision, arXiv 2211.14275). A head with two outputs and
    their cross-entropy is the same with s their difference.

    Args:
        scores: s, any shape.
        right: bool, of that shape.
    """
    if scores.shape != right.shape:
        raise ValueError(f"scores of shape {tuple(scores.shape)}, labels {tuple(right.shape)}")
    return -functional.logsigmoid(torch.where(right, scores, -scores))


def aggregated(probabilities: Sequence[float], aggregate: Aggregate) -> float:
    """One number in [0, 1] of the probabilities that each step is right; at least one.

    `product` falls with the number of steps; `last` is a value, if the last score was trained as one.
    """
    if not probabilities:
        raise ValueError("there is no step")
    if aggregate == "min":
        return min(probabilities)
    if aggregate == "product":
        return math.prod(probabilities)
    return probabilities[-1] if aggregate == "last" else sum(probabilities) / len(probabilities)


def step_progress(probabilities: Sequence[float], steps: Sequence[int], before: float) -> list[float]:
    """p_k - p_(k-1) for each token of step k, from p_0 = `before`; 0 for tokens of a step without a score.

    A sum over steps of what each has changed is p_K - p_0, whatever their number; of the scores themselves it would
    grow with every further step. With values V_k of the states before steps and `before` = V_1 it is their advantage
    V_(k+1) - V_k.

    Args:
        probabilities: p_k of each step, in order.
        steps: number of each token's step, from 0.
    """
    changes = [after - start for start, after in zip([before, *probabilities], probabilities, strict=False)]
    return [changes[step] if step < len(changes) else 0.0 for step in steps]
