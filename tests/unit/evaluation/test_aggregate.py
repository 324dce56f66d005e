"""The interquartile mean and its bootstrap."""

import numpy as np
import pytest

from posttrain.evaluation.aggregate import interquartile_interval, interquartile_mean


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0], 1.0),
        ([1.0, 2.0, 6.0], 3.0),  # fewer than four: the mean
        ([0.0, 1.0, 3.0, 100.0], 2.0),
        ([[0.0, 1.0], [3.0, 100.0]], 2.0),  # over all, not per benchmark
        (list(range(8)), 3.5),
        ([-50, 2, 3, 4, 900], 3.0),  # one of five at each end
    ],
)
def test_by_hand(scores: list, expected: float):
    assert interquartile_mean(scores) == pytest.approx(expected)


def test_one_bad_seed_moves_it_little():
    scores = [0.50, 0.51, 0.52, 0.53, 0.0]
    assert interquartile_mean(scores) > 0.49 > np.mean(scores)


def test_the_interval_is_repeatable_and_has_no_width_without_spread():
    scores = np.random.default_rng(0).random((6, 2))
    first, again = (interquartile_interval(scores, seed=1) for _ in range(2))
    assert first == again
    assert first.low <= first.value <= first.high
    assert (first.method, first.problems) == ("stratified bootstrap", 6)
    flat = interquartile_interval([[0.4]] * 5)
    assert flat.low == pytest.approx(flat.high)


def test_seeds_are_redrawn_within_each_benchmark():
    """With two benchmarks far apart, no draw may hold more of one than of the other."""
    scores = np.array([[0.0, 1.0]] * 5)
    interval = interquartile_interval(scores)
    assert (interval.low, interval.value, interval.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(("seeds", "low", "high"), [(3, 0.70, 0.90), (5, 0.78, 0.93), (20, 0.89, 0.97)])
def test_coverage_is_too_low_with_few_seeds_and_right_with_many(seeds: int, low: float, high: float):
    """Which is why `compare` warns below five seeds and leaves decisions to the test."""
    rng, hits = np.random.default_rng(seeds), 0
    for _ in range(500):
        interval = interquartile_interval(rng.normal(size=(seeds, 1)), draws=500)
        hits += interval.low <= 0.0 <= interval.high
    assert low <= hits / 500 <= high


@pytest.mark.parametrize("scores", [[], [1.0, 2.0], [[[1.0]]]])
def test_other_shapes_are_refused(scores: list):
    with pytest.raises(ValueError, match="seeds by benchmarks"):
        interquartile_interval(scores)
