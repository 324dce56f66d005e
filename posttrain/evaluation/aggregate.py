"""Means over seeds and benchmarks that one bad seed cannot move: the interquartile mean, with its bootstrap interval.

Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical Precipice, arXiv 2108.13264.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.evaluation.statistics import Interval

FEW_SEEDS = 5
"""With fewer seeds a bootstrap interval is too narrow: it never sees a value that was not drawn."""


def interquartile_mean(scores: ArrayLike) -> float:
    """Mean of the middle half of all scores, whatever their shape: floor(n / 4) are left out at each end.

    With fewer than four scores it is the mean.
    """
    return float(_trimmed(np.sort(np.asarray(scores, dtype=np.float64).ravel())))


def interquartile_interval(scores: ArrayLike, *, level: float = 0.95, seed: int = 0, draws: int = 10_000) -> Interval:
    """Percentile interval of the interquartile mean; seeds are redrawn within each benchmark.

    Args:
        scores: (S, B), S seeds by B benchmarks, at least one of each.
        level: nominal coverage. With few seeds the true one is lower, see `FEW_SEEDS`.
        seed: of the bootstrap.
        draws: of the bootstrap.

    Returns:
        `problems` is the number of seeds.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"need seeds by benchmarks, got shape {scores.shape}")
    seeds, benchmarks = scores.shape
    chosen = np.random.default_rng(seed).integers(0, seeds, size=(draws, seeds, benchmarks))
    drawn = np.take_along_axis(scores[None], chosen, axis=1).reshape(draws, -1)
    means = _trimmed(np.sort(drawn, axis=1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(interquartile_mean(scores), float(low), float(high), level, "stratified bootstrap", seeds)


def _trimmed(ordered: NDArray[np.float64]) -> NDArray[np.float64]:
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)
