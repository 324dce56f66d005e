"""Estimates and their uncertainty, in numpy alone.

The sampling unit is the problem: a benchmark's problems stand for all problems like them, and several samples of one
problem say less than as many problems. So every function takes one value per problem, and every interval is clustered
by problem (Miller 2024, arXiv 2411.00640). Problems count equally, whatever their number of judged samples.

Which interval `mean_interval` uses, and names in `Interval.method`:

- `wilson`: every problem's value is 0 or 1 (greedy accuracy, one sample per problem, all right, all wrong), or there
  is no spread to estimate (one problem, all values equal). Wilson's score interval on the number of problems.
- `guarded t`: any other values in [0, 1] (avg@n, pass@k). A t interval over problems, to which half a problem that is
  always right and half a one that is always wrong are added. Where rates differ much between problems, the few with
  high ones may be missing from the sample; mean and spread of what was seen then say too little, however often each
  problem was sampled. The added problem is what P of them cannot rule out, and it fades as 1 / P. For shares of one
  sample per problem the same idea is that of Agresti and Coull 1998, Am. Stat. 52(2). `coverage.py` prints what
  the intervals cover.
- `clustered t`, `clustered bootstrap`: on request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.evaluation.distributions import normal_quantile, t_quantile

_CHUNK = 4_000_000
"""Random numbers drawn at once."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        value: the estimate, a mean over problems.
        low: lower end.
        high: upper end.
        level: nominal coverage, e.g. 0.95.
        method: how the ends were found; see the module.
        problems: number of problems.
    """

    value: float
    low: float
    high: float
    level: float
    method: str
    problems: int


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A paired test of a difference.

    Attributes:
        p: two-sided p-value.
        method: `exact sign test`, `exact sign flips` or `random sign flips`.
        changed: number of problems whose value differs.
    """

    p: float
    method: str
    changed: int


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """Probability that at least one of k samples is right, per problem: 1 - C(n-c, k) / C(n, k).

    Unbiased: the share of the k-subsets of the n samples that hold a right one (Chen et al. 2021, arXiv 2107.03374).
    Computed as a product of k factors in [0, 1], so that no binomial coefficient overflows.

    Args:
        samples: (P,) judged samples n of each problem, each at least k.
        correct: (P,) right ones c among them.
        k: at least 1.

    Returns:
        (P,) in [0, 1].
    """
    n, c = np.broadcast_arrays(np.asarray(samples, dtype=np.float64), np.asarray(correct, dtype=np.float64))
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} needs k >= 1 and at least k samples of every problem")
    if (c < 0).any() or (c > n).any():
        raise ValueError("more right samples than samples, or fewer than none")
    none_right = np.ones(n.shape)
    for i in range(k):
        none_right = none_right * np.maximum(n - c - i, 0.0) / (n - i)
    return 1.0 - none_right


def avg_at_n(samples: ArrayLike, correct: ArrayLike) -> NDArray[np.float64]:
    """Share of right samples per problem, (P,): the estimate of accuracy at the sampling temperature; pass@1."""
    return pass_at_k(samples, correct, 1)


def wilson_interval(share: float, problems: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval (1927) of a share of `problems` independent ones. Never of zero width.

    Args:
        share: in [0, 1].
        problems: at least 1.
    """
    low, high = _wilson(share, problems, normal_quantile(level))
    return Interval(share, low, high, level, "wilson", problems)


def mean_interval(
    values: ArrayLike,
    *,
    level: float = 0.95,
    method: Literal["auto", "t", "bootstrap"] = "auto",
    seed: int = 0,
    draws: int = 10_000,
) -> Interval:
    """Interval of the mean over problems, clustered by problem; see the module for which one.

    Without spread between problems every method falls back to `wilson`, so that no interval has zero width.

    Args:
        values: (P,) one value in [0, 1] per problem, P at least 1.
        level: nominal coverage.
        method: `t` for the cluster-robust t interval, `bootstrap` for the percentile bootstrap over problems.
        seed: of the bootstrap.
        draws: of the bootstrap.
    """
    values = _checked(values)
    estimate, m = float(values.mean()), len(values)
    if np.ptp(values) == 0.0:
        return wilson_interval(float(values[0]), m, level=level)
    if method == "bootstrap":
        low, high = np.quantile(_bootstrap_means(values, seed, draws), [(1 - level) / 2, (1 + level) / 2])
        return Interval(estimate, float(low), float(high), level, "clustered bootstrap", m)
    error = float(values.std(ddof=1)) / math.sqrt(m)
    t = t_quantile(level, m - 1)
    if method == "t":
        return Interval(estimate, max(estimate - t * error, 0), min(estimate + t * error, 1), level, "clustered t", m)
    if np.isin(values, (0.0, 1.0)).all():
        return wilson_interval(estimate, m, level=level)
    low, high = _guarded(values, (0.0, 1.0), t)
    return Interval(estimate, min(max(low, 0.0), estimate), max(min(high, 1.0), estimate), level, "guarded t", m)


def difference_interval(
    base: ArrayLike, other: ArrayLike, *, level: float = 0.95, method: Literal["auto", "t"] = "auto"
) -> Interval:
    """Interval of mean(other) - mean(base) on the same problems: `guarded t` of the differences per problem.

    Half a problem is added at each end of their range, -1 and 1, as `mean_interval` does at 0 and 1. Where all
    differences are equal there is no spread to estimate. Then the ends allow for the share of problems that could
    differ from the others although none of P did (Wilson's limit for 0 of P, `wilson bound`).

    Args:
        base: (P,) values in [0, 1].
        other: (P,) values in [0, 1], of the same problems in the same order.
        level: nominal coverage.
        method: `t` without the guard, for scores of seeds: each is a mean over many problems, so no rare one hides.
            With three seeds the guard would span all that is possible, whatever they say.
    """
    differences = _differences(base, other)
    estimate, m = float(differences.mean()), len(differences)
    if np.ptp(differences) == 0.0:
        share = wilson_interval(0.0, m, level=level).high
        low, high = estimate - share * (1.0 + estimate), estimate + share * (1.0 - estimate)
        return Interval(estimate, low, high, level, "wilson bound", m)
    t = t_quantile(level, m - 1)
    if method == "t":
        error = float(differences.std(ddof=1)) / math.sqrt(m)
        return Interval(estimate, max(estimate - t * error, -1.0), min(estimate + t * error, 1.0), level, "paired t", m)
    low, high = _guarded(differences, (-1.0, 1.0), t)
    return Interval(estimate, min(max(low, -1.0), estimate), max(min(high, 1.0), estimate), level, "paired t", m)


def paired_test(base: ArrayLike, other: ArrayLike, *, seed: int = 0, draws: int = 20_000) -> PairedTest:
    """Two-sided sign-flip test of no difference on the same problems.

    If the two are alike, each problem's difference is as likely to have the other sign. The p-value is the share of
    sign patterns whose sum is at least as far from 0 as the one seen. Differences of one size (greedy, 0 or 1) make it
    the exact sign test, which is McNemar's exact test; up to 14 changed problems are enumerated; more are sampled,
    with (hits + 1) / (draws + 1), which keeps the test valid (Phipson and Smyth 2010, arXiv 1603.05766).

    Args:
        base: (P,) values in [0, 1].
        other: (P,) values in [0, 1], of the same problems in the same order.
        seed: of the random sign flips.
        draws: number of random sign flips.
    """
    return sign_flip_test(_differences(base, other), seed=seed, draws=draws)


def sign_flip_test(differences: ArrayLike, *, seed: int = 0, draws: int = 20_000) -> PairedTest:
    """The test of `paired_test` on differences of any size, (P,), one per problem or prompt."""
    differences = np.asarray(differences, dtype=np.float64)
    changed = differences[differences != 0.0]
    sizes, m = np.abs(changed), len(changed)
    if m == 0:
        return PairedTest(1.0, "exact sign test", 0)
    if np.ptp(sizes) == 0.0:
        fewer = min(int((changed > 0).sum()), int((changed < 0).sum()))
        tail = sum(math.comb(m, i) for i in range(fewer + 1))
        return PairedTest(min(1.0, 2 * tail / 2**m), "exact sign test", m)
    # A sum equal to the one seen counts as extreme, whatever rounding does to it.
    seen = abs(float(changed.sum())) - 1e-9 * max(1.0, float(sizes.max()))
    if m <= 14:
        signs = 1 - 2 * (np.arange(2**m)[:, None] >> np.arange(m) & 1)
        return PairedTest(float((np.abs(signs @ sizes) >= seen).mean()), "exact sign flips", m)
    rng = np.random.default_rng(seed)
    hits, step = 0, max(1, _CHUNK // m)
    for start in range(0, draws, step):
        signs = rng.integers(0, 2, size=(min(step, draws - start), m), dtype=np.int8)
        hits += int((np.abs(2.0 * (signs @ sizes) - sizes.sum()) >= seen).sum())
    return PairedTest((hits + 1) / (draws + 1), "random sign flips", m)


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    scale = 1.0 + z * z / n
    centre = (share + z * z / (2.0 * n)) / scale
    reach = z / scale * math.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    # At 0 and 1 the end is exact; rounding would put it a hair inside.
    low = 0.0 if share == 0.0 else max(centre - reach, 0.0)
    high = 1.0 if share == 1.0 else min(centre + reach, 1.0)
    return low, high


def _guarded(values: NDArray[np.float64], ends: tuple[float, float], t: float) -> tuple[float, float]:
    """Ends of a t interval with half a value added at each end of the range."""
    m = len(values) + 1
    mean = float(values.sum() + sum(ends) / 2.0) / m
    squares = float(((values - mean) ** 2).sum() + sum((end - mean) ** 2 for end in ends) / 2.0)
    reach = t * math.sqrt(squares / (m - 1) / m)
    return mean - reach, mean + reach


def _bootstrap_means(values: NDArray[np.float64], seed: int, draws: int) -> NDArray[np.float64]:
    rng, step = np.random.default_rng(seed), max(1, _CHUNK // len(values))
    chunks = [
        values[rng.integers(0, len(values), size=(min(step, draws - start), len(values)))].mean(axis=1)
        for start in range(0, draws, step)
    ]
    return np.concatenate(chunks)


def _differences(base: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    base, other = _checked(base), _checked(other)
    if base.shape != other.shape:
        raise ValueError(f"{len(base)} and {len(other)} problems cannot be paired")
    return other - base


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"need one value per problem and at least one problem, got shape {values.shape}")
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise ValueError("values must be in [0, 1]")
    return values
