"""Which share of groups would have rewards that differ, foretold from a posterior over each problem's rewards.

The rewards of problem i are taken as draws from a categorical distribution p_i over the K values that occur anywhere,
with p_i ~ Dirichlet(s b): the commonest value has b = m, and the others share 1 - m as often as they occur. With a flat
prior on a grid of m and of log s, c_ij rewards of value j leave p_i ~ Dirichlet(s b + c_i) at each point of the grid,
and their likelihood the weight of the point (Gelman et al., Bayesian Data Analysis, chapter 5). With two values, right
and wrong, these are pass rates with a Beta prior. A group of G is uninformative with probability sum_j p_ij^G, whose
mean under a Dirichlet is a ratio of gamma functions. The shares grow with G, as they do for any fixed rates; rates put
in as if they were known do not, since 0 of 4 then stands for a problem that is never solved. Where sampling stopped at
enough right ones the likelihood is the same but for a constant, so nothing needs correcting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from math import isfinite, lgamma

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.statistics import Interval

MEANS = tuple(1.0 / (1.0 + np.exp(-logit)) for logit in np.linspace(-7.0, 7.0, 29))
CONCENTRATIONS = tuple(float(s) for s in np.exp(np.linspace(np.log(0.05), np.log(100.0), 16)))

MOST_DRAWN = 4_000_000
"""Problems drawn for the interval; with very many, or many values, fewer draws of each do."""

_lgamma = np.vectorize(lgamma, otypes=[float])

_Profile = tuple[tuple[int, int], ...]
"""Of one problem: for each value seen there, its kind (see `_Prior`) and how often it was seen."""


def informative_shares(
    rewards: Sequence[Sequence[float]],
    sizes: Sequence[int],
    *,
    level: float = 0.95,
    seed: int = 0,
    draws: int = 2_000,
) -> dict[int, Interval]:
    """Group size -> expected share of groups whose rewards differ, over problems like these.

    Args:
        rewards: of the samples of each problem; at least one problem and one sample of each.
        sizes: of the groups, from 1.
        level: of the credible interval, which covers rates, their distribution and the choice of problems.
        seed: of the draws for the interval.
        draws: from the posterior, at most.

    Raises:
        ValueError: a problem without samples, or a reward that is not finite.
    """
    if not rewards or any(not group or not all(map(isfinite, group)) for group in rewards):
        raise ValueError("need at least one problem, and for each at least one reward, all of them finite")
    # As the trainer compares them, in single precision.
    groups = [Counter(float(np.float32(value)) for value in group) for group in rewards]
    prior = _Prior(groups)
    found = Counter(prior.profile(group) for group in groups)
    log_likelihood = np.sum([count * prior.log_likelihood(profile) for profile, count in found.items()], axis=0)
    weight = np.exp(log_likelihood - log_likelihood.max())
    weight /= weight.sum()
    rng = np.random.default_rng(seed)
    rates = sum(len(profile) * count for profile, count in found.items())
    points = rng.choice(len(weight), size=min(draws, max(200, MOST_DRAWN // rates)), p=weight)
    shares = _drawn(rng, prior, points, found, sizes)
    tails = [(1 - level) / 2, (1 + level) / 2]
    intervals = {}
    for size, drawn in zip(sizes, shares, strict=True):
        alike = np.sum([count * prior.alike(profile, size) for profile, count in found.items()], axis=0)
        value = 1.0 - float(weight @ alike) / len(rewards)
        low, high = (float(end) for end in np.quantile(drawn, tails))
        intervals[size] = Interval(value, min(low, value), max(high, value), level, "posterior", len(rewards))
    return intervals


class _Prior:
    """Dirichlet(s b) over the values that occur, at each point of the grid; all arrays are (grid,).

    Values of the same kind have the same prior: kind 0 is the commonest value, kind n another that occurs n times.
    Where only one value occurs, a second one stands for those that did not.
    """

    def __init__(self, groups: Sequence[Counter[float]]) -> None:
        occurs: Counter[float] = Counter()
        for group in groups:
            occurs.update(group)
        (commonest, _), *others = sorted(occurs.items(), key=lambda each: (-each[1], -each[0]))
        self._kind = {commonest: 0} | dict(others)
        self._values = Counter([0, *(count for _, count in others)] if others else [0, 1])
        mean, self.total = (part.ravel() for part in np.meshgrid(MEANS, CONCENTRATIONS))
        rest = sum(kind * number for kind, number in self._values.items())
        self.parameter = {
            kind: self.total * (mean if kind == 0 else (1.0 - mean) * (kind / rest)) for kind in self._values
        }
        self._power = cache(self._power_of)
        self._all = cache(self._power_of_all)

    def profile(self, group: Counter[float]) -> _Profile:
        """What matters here of the rewards of a problem."""
        return tuple(sorted((self._kind[value], seen) for value, seen in group.items()))

    def log_likelihood(self, profile: _Profile) -> NDArray[np.float64]:
        """Of the rewards of a problem, in their order."""
        samples = sum(seen for _, seen in profile)
        parts = [_log_rising(self.parameter[kind], seen) for kind, seen in profile]
        return np.sum(parts, axis=0) - _log_rising(self.total, samples)

    def alike(self, profile: _Profile, size: int) -> NDArray[np.float64]:
        """Mean of sum_j p_j^size, given the rewards of a problem."""
        samples = sum(seen for _, seen in profile)
        shown = np.sum([self._power(kind, seen, samples, size) for kind, seen in profile], axis=0)
        return shown + self._unseen(profile, size) * _rising_ratio(self.total, self.total + samples, size)

    def unseen(self, profile: _Profile) -> NDArray[np.float64]:
        """Sum of the parameters of the values that a problem did not show; 0 if it showed all."""
        if len(profile) == self._values.total():
            return np.zeros_like(self.total)
        return self.total - np.sum([self.parameter[kind] for kind, _ in profile], axis=0)

    def split(self, profile: _Profile, size: int) -> NDArray[np.float64]:
        """Mean of sum_j w_j^size, w_j being the part of each unseen value in what they have together."""
        unseen = self.unseen(profile)
        if not unseen.any():
            return unseen
        # A difference that is inexact only where p_j^size is too small to matter.
        return np.minimum(self._unseen(profile, size) * _rising_ratio(self.total, unseen, size), 1.0)

    def _unseen(self, profile: _Profile, size: int) -> NDArray[np.float64]:
        """Mean under the prior of sum_j p_j^size over the values that a problem did not show."""
        shown = np.sum([self._power(kind, 0, 0, size) for kind, _ in profile], axis=0)
        return np.maximum(self._all(size) - shown, 0.0)

    def _power_of(self, kind: int, seen: int, samples: int, size: int) -> NDArray[np.float64]:
        """Mean of p_j^size for one value, seen so often among so many samples."""
        return _rising_ratio(self.parameter[kind] + seen, self.total + samples, size)

    def _power_of_all(self, size: int) -> NDArray[np.float64]:
        return np.sum([number * self._power(kind, 0, 0, size) for kind, number in self._values.items()], axis=0)


def _log_rising(x: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """Logarithm of x (x + 1) ... (x + steps - 1)."""
    return _lgamma(x + steps) - _lgamma(x)


def _rising_ratio(x: NDArray[np.float64], y: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """x (x + 1) ... (x + steps - 1) over the same of y, as a product of ratios."""
    ratio = np.ones_like(x)
    for step in range(steps):
        ratio *= (x + step) / (y + step)
    return ratio


def _drawn(
    rng: np.random.Generator,
    prior: _Prior,
    points: NDArray[np.int64],
    found: Counter[_Profile],
    sizes: Sequence[int],
) -> list[NDArray[np.float64]]:
    """Shares of each size in draws from the posterior, with the problems drawn again by random weights (draws,).

    Values that a problem did not show are drawn together; within them the mean of `split` stands for a draw.
    """
    total = [np.zeros(len(points)) for _ in sizes]
    mass = np.zeros(len(points))
    for profile, count in found.items():
        parameters = [prior.parameter[kind][points] + seen for kind, seen in profile] + [prior.unseen(profile)[points]]
        splits = [prior.split(profile, size)[points] for size in sizes]
        for _ in range(count):
            parts = rng.standard_gamma(np.stack(parameters))
            *shown, unseen = parts / parts.sum(axis=0)
            weight = rng.exponential(size=len(points))
            mass += weight
            for place, (size, split) in enumerate(zip(sizes, splits, strict=True)):
                alike = np.sum([rate**size for rate in shown], axis=0) + split * unseen**size
                total[place] += weight * (1.0 - alike)
    return [each / mass for each in total]
