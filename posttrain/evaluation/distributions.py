"""Quantiles of the normal and of Student's t distribution, so that evaluation needs no scipy."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np


def normal_quantile(level: float) -> float:
    """The z with P(|Z| <= z) = `level` for a standard normal Z; 1.96 for 0.95."""
    return NormalDist().inv_cdf((1.0 + level) / 2.0)


def t_probability(t: float, df: int) -> float:
    """P(|T| <= t) for Student's t with a whole number of degrees of freedom.

    The finite series of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4. All terms are
    positive, so nothing cancels.
    """
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2 == 0:
        j = np.arange(1, df // 2)
        return float(sine * (1.0 + np.cumprod((2 * j - 1) / (2 * j) * cosine**2).sum()))
    if df == 1:
        return 2.0 * angle / math.pi
    j = np.arange(1, (df - 1) // 2)
    series = cosine * (1.0 + np.cumprod(2 * j / (2 * j + 1) * cosine**2).sum())
    return float(2.0 / math.pi * (angle + sine * series))


@lru_cache(maxsize=256)
def t_quantile(level: float, df: int) -> float:
    """The t with P(|T| <= t) = `level`, by bisection; 2.262 for 0.95 and 9 degrees of freedom."""
    if df < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"need df >= 1 and a level in (0, 1), got {df} and {level}")
    low, high = 0.0, 1.0
    while t_probability(high, df) < level:
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if t_probability(middle, df) < level else (low, middle)
    return (low + high) / 2.0
