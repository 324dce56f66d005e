"""Losses and aggregates of process reward models, from one score per step."""

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
