"""The share of informative groups: grows with the group, is right on average, and its interval covers."""

from __future__ import annotations

from itertools import product
from math import exp, lgamma

import numpy as np
import pytest

from posttrain.evaluation.informative import CONCENTRATIONS, MEANS, informative_shares

SIZES = (2, 4, 8, 16, 64)


def of_counts(*counts: tuple[int, int]) -> list[list[float]]:
    """Rewards of problems with so many right ones among so many samples."""
    return [[1.0] * right + [0.0] * (samples - right) for right, samples in counts]


def drawn(rng: np.random.Generator, problems: int, samples: int, a: float, b: float) -> list[list[float]]:
    return of_counts(*((int(count), samples) for count in rng.binomial(samples, rng.beta(a, b, size=problems))))


def true_share(a: float, b: float, size: int) -> float:
    rates = np.random.default_rng(99).beta(a, b, size=400_000)
    return float((1 - rates**size - (1 - rates) ** size).mean())


@pytest.mark.parametrize(
    "rewards",
    [
        of_counts(*[(0, 4)] * 60, *[(1, 4)] * 10, *[(4, 4)] * 10),
        of_counts(*[(0, 4)] * 20),
        of_counts(*[(4, 4)] * 20),
        of_counts((1, 2)),
        of_counts((3, 8), (0, 1), (2, 5)),
        [[0.0, 0.1, 0.2, 0.3, 0.4]] * 30,
        [[0.0, 0.0, 0.0, 0.5], [1.0], [0.25, 0.5, 0.75]],
        [[0.37 * n + problem for n in range(4)] for problem in range(40)],
    ],
)
def test_larger_groups_are_informative_more_often(rewards: list[list[float]]) -> None:
    found = informative_shares(rewards, SIZES)
    values = [found[size].value for size in SIZES]
    assert all(one <= other for one, other in zip(values, values[1:], strict=False)) and values[0] < values[-1]
    assert all(0 <= each.low <= each.value <= each.high <= 1 for each in found.values())
    assert {each.problems for each in found.values()} == {len(rewards)}


def test_rates_that_are_known_leave_no_doubt() -> None:
    """With very many samples a problem's rate is known, and the share is what the rates say."""
    rewards = of_counts(*[(1_000, 4_000)] * 40, *[(4_000, 4_000)] * 40)
    for size, found in informative_shares(rewards, (2, 8)).items():
        assert found.value == pytest.approx((1 - 0.25**size - 0.75**size) / 2, abs=5e-3)


def test_graded_rewards_differ_as_often_as_their_values_do() -> None:
    """Five values, each in a fifth of the samples: of two rewards four fifths differ, of four 1 - 5 / 5^4."""
    values = [0.0, 0.1, 0.2, 0.3, 0.4]
    known = informative_shares([values * 400] * 30, (2, 4))
    assert known[2].value == pytest.approx(0.8, abs=1e-3) and known[4].value == pytest.approx(0.992, abs=1e-3)
    few = informative_shares([values] * 200, (2,))[2]
    assert few.value == pytest.approx(0.8, abs=0.02)
    # Two values that differ in half of the problems only, and rewards of which no two are alike.
    half = informative_shares([[0.3, 0.6] * 500] * 20 + [[0.0] * 1_000] * 20, (2,))[2]
    assert half.value == pytest.approx(0.25, abs=5e-3)
    assert informative_shares([[problem + n / 7 for n in range(4)] for problem in range(50)], (2,))[2].value > 0.95


def test_two_values_are_right_and_wrong() -> None:
    """Any two values give what the Beta model of pass rates gives, computed here without the rest."""
    counts, size = [(1, 4), (4, 4), (0, 3)], 4
    weights, shares = [], []
    for mean, total in product(MEANS, CONCENTRATIONS):
        a, b = mean * total, (1 - mean) * total
        log, share = 0.0, 0.0
        for right, samples in counts:
            log += log_beta(a + right, b + samples - right) - log_beta(a, b)
            alike = (log_beta(a + right + size, b + samples - right), log_beta(a + right, b + samples - right + size))
            share += 1 - sum(exp(each - log_beta(a + right, b + samples - right)) for each in alike)
        weights.append(exp(log))
        shares.append(share / len(counts))
    expected = sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights)
    for low, high in ((0.0, 1.0), (-0.5, 0.3), (1.0, 0.0)):
        rewards = [[high] * right + [low] * (samples - right) for right, samples in counts]
        assert informative_shares(rewards, (size,))[size].value == pytest.approx(expected, rel=1e-9)


def log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)


@pytest.mark.parametrize(("samples", "a", "b"), [(4, 0.2, 1.0), (2, 0.5, 0.5), (8, 0.05, 1.0)])
def test_the_interval_covers_and_the_estimate_is_near(samples: int, a: float, b: float) -> None:
    rng, repeats = np.random.default_rng(1), 60
    truth, hits, error = {size: true_share(a, b, size) for size in (4, 16)}, 0, 0.0
    for _ in range(repeats):
        found = informative_shares(drawn(rng, 80, samples, a, b), (4, 16), draws=300)
        hits += sum(found[size].low <= truth[size] <= found[size].high for size in truth)
        error += sum(found[size].value - truth[size] for size in truth)
    # 120 nominal 95% intervals, two of each data set alike: 0.95 - 3 * sqrt(0.95 * 0.05 / 60).
    assert hits / (2 * repeats) >= 0.866
    assert abs(error / (2 * repeats)) < 0.03


def test_the_interval_covers_for_graded_rewards() -> None:
    rng, repeats, parameters = np.random.default_rng(2), 40, np.array([0.5, 0.2, 0.2, 0.1])
    truth = 1 - (rng.dirichlet(parameters, size=200_000) ** 4).sum(axis=1).mean()
    hits = 0
    for _ in range(repeats):
        rates = rng.dirichlet(parameters, size=60)
        found = informative_shares([list(rng.choice(4, size=4, p=each) / 3) for each in rates], (4,), draws=300)[4]
        hits += found.low <= truth <= found.high
    assert hits / repeats >= 0.85  # 0.95 - 3 standard errors


@pytest.mark.parametrize("rewards", [[], [[]], [[1.0], []], [[float("nan")]], [[0.0, float("inf")]]])
def test_what_is_no_reward_is_refused(rewards: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="at least one reward"):
        informative_shares(rewards, SIZES)
