"""The share of informative groups: grows with the group, is right on average, and its interval covers."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.evaluation.informative import informative_shares

SIZES = (2, 4, 8, 16, 64)


def drawn(rng: np.random.Generator, problems: int, samples: int, a: float, b: float) -> list[tuple[int, int]]:
    return [(int(count), samples) for count in rng.binomial(samples, rng.beta(a, b, size=problems))]


def true_share(a: float, b: float, size: int) -> float:
    rates = np.random.default_rng(99).beta(a, b, size=400_000)
    return float((1 - rates**size - (1 - rates) ** size).mean())


@pytest.mark.parametrize(
    "counts",
    [
        [(0, 4)] * 60 + [(1, 4)] * 10 + [(4, 4)] * 10,
        [(0, 4)] * 20,
        [(4, 4)] * 20,
        [(1, 2)],
        [(3, 8), (0, 1), (2, 5)],
    ],
)
def test_larger_groups_are_informative_more_often(counts: list[tuple[int, int]]) -> None:
    found = informative_shares(counts, SIZES)
    values = [found[size].value for size in SIZES]
    assert all(one < other for one, other in zip(values, values[1:], strict=False))
    assert all(0 <= each.low <= each.value <= each.high <= 1 for each in found.values())
    assert {each.problems for each in found.values()} == {len(counts)}


def test_rates_that_are_known_leave_no_doubt() -> None:
    """With very many samples a problem's rate is known, and the share is what the rates say."""
    counts = [(1_000, 4_000)] * 40 + [(4_000, 4_000)] * 40
    for size, found in informative_shares(counts, (2, 8)).items():
        assert found.value == pytest.approx((1 - 0.25**size - 0.75**size) / 2, abs=5e-3)


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


@pytest.mark.parametrize("counts", [[], [(1, 0)], [(3, 2)], [(-1, 2)]])
def test_impossible_counts_are_refused(counts: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="right samples"):
        informative_shares(counts, SIZES)
