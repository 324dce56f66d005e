"""Which share of groups would have rewards that differ, foretold from a posterior over the problems' pass rates.

Rates are taken as p_i ~ Beta(m s, (1 - m) s) with a flat prior on a grid of the mean m and of log s; c_i right ones of
n_i samples then leave p_i ~ Beta(m s + c_i, (1 - m) s + n_i - c_i) at each point of the grid, and their likelihood the
weight of the point (Gelman et al., Bayesian Data Analysis, chapter 5). A group of G is uninformative with probability
p^G + (1 - p)^G, whose mean under a Beta is a ratio of gamma functions. The shares grow with G, as they do for any fixed
rates; rates put in as if they were known do not, since 0 of 4 then stands for a problem that is never solved. Where
sampling stopped at enough right ones the likelihood is the same but for a constant, so nothing needs correcting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import lgamma

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.statistics import Interval

MEANS = tuple(1.0 / (1.0 + np.exp(-logit)) for logit in np.linspace(-7.0, 7.0, 29))
CONCENTRATIONS = tuple(float(s) for s in np.exp(np.linspace(np.log(0.05), np.log(100.0), 16)))

MOST_DRAWN = 4_000_000
"""Rates drawn for the interval; with very many problems fewer draws of each do."""

_lgamma = np.vectorize(lgamma, otypes=[float])


def informative_shares(
    counts: Sequence[tuple[int, int]], sizes: Sequence[int], *, level: float = 0.95, seed: int = 0, draws: int = 2_000
) -> dict[int, Interval]:
    """Group size -> expected share of informative groups, over problems like these.

    Args:
        counts: (right, judged) samples of each problem, at least one problem and one sample of each.
        sizes: of the groups, from 1.
        level: of the credible interval, which covers rates, their distribution and the choice of problems.
        seed: of the draws for the interval.
        draws: from the posterior, at most.
    """
    if not counts or any(not 0 <= right <= judged or judged < 1 for right, judged in counts):
        raise ValueError("need for each problem its right samples among at least one judged one")
    found = Counter(counts)
    cells = sorted(found)
    right, judged, times = (np.array(column) for column in (*zip(*cells, strict=True), [found[cell] for cell in cells]))
    a, b = _grid()
    # (grid, cells): parameters of each problem's posterior.
    alpha, beta = a[:, None] + right, b[:, None] + (judged - right)
    weight = _weights(_log_beta(alpha, beta) - _log_beta(a, b)[:, None], times)
    rng = np.random.default_rng(seed)
    points = rng.choice(len(weight), size=min(draws, max(200, MOST_DRAWN // len(counts))), p=weight)
    shares = _drawn(rng, alpha[points], beta[points], times, sizes)
    tails = [(1 - level) / 2, (1 + level) / 2]
    intervals = {}
    for size, drawn in zip(sizes, shares, strict=True):
        alike = _expected_power(alpha, beta, size) + _expected_power(beta, alpha, size)
        value = float(weight @ ((1.0 - alike) @ times)) / len(counts)
        low, high = (float(end) for end in np.quantile(drawn, tails))
        intervals[size] = Interval(value, min(low, value), max(high, value), level, "posterior", len(counts))
    return intervals


def _grid() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean, concentration = (part.ravel() for part in np.meshgrid(MEANS, CONCENTRATIONS))
    return mean * concentration, (1.0 - mean) * concentration


def _weights(log_likelihood: NDArray[np.float64], times: NDArray[np.int64]) -> NDArray[np.float64]:
    total = log_likelihood @ times
    weight = np.exp(total - total.max())
    return weight / weight.sum()


def _log_beta(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return _lgamma(a) + _lgamma(b) - _lgamma(a + b)


def _expected_power(alpha: NDArray[np.float64], beta: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """E p^size under Beta(alpha, beta), as a product of ratios below 1."""
    power = np.ones_like(alpha)
    for step in range(size):
        power *= (alpha + step) / (alpha + beta + step)
    return power


def _drawn(
    rng: np.random.Generator,
    alpha: NDArray[np.float64],
    beta: NDArray[np.float64],
    times: NDArray[np.int64],
    sizes: Sequence[int],
) -> list[NDArray[np.float64]]:
    """Shares of each size in draws from the posterior, with the problems drawn again by random weights (draws,)."""
    total = [np.zeros(len(alpha)) for _ in sizes]
    mass = np.zeros(len(alpha))
    for cell, count in enumerate(times):
        for _ in range(count):
            rate = rng.beta(alpha[:, cell], beta[:, cell])
            weight = rng.exponential(size=len(alpha))
            mass += weight
            for place, size in enumerate(sizes):
                total[place] += weight * (1.0 - rate**size - (1.0 - rate) ** size)
    return [each / mass for each in total]
