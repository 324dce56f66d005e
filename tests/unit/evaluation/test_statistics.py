"""Estimators against enumeration, intervals against simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.evaluation.distributions import t_quantile
from posttrain.evaluation.statistics import (
    avg_at_n,
    difference_interval,
    mean_interval,
    paired_test,
    pass_at_k,
    wilson_interval,
)

# ------------------------------------------------------------------------------------------------------------ pass@k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k([n], [c], k)[0] == pytest.approx(np.mean([any(subset) for subset in subsets]), abs=1e-14)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(200, 1, 100), (1000, 3, 64), (10_000, 2, 1), (10_000, 9_999, 5000), (64, 0, 64)]
)
def test_pass_at_k_is_exact_for_large_n(n: int, c: int, k: int):
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at_k([n], [c], k)[0] == pytest.approx(exact, rel=1e-11, abs=1e-15)


def test_pass_at_k_is_unbiased():
    p, n, k = 0.3, 6, 3
    weights = np.array([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])
    assert weights @ pass_at_k([n] * (n + 1), range(n + 1), k) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@given(st.data())
def test_pass_at_k_lies_between_0_and_1_and_grows_with_k(data: st.DataObject):
    n = data.draw(st.integers(1, 60))
    c = data.draw(st.integers(0, n))
    values = [pass_at_k([n], [c], k)[0] for k in range(1, n + 1)]
    assert values[0] == pytest.approx(c / n)
    assert all(0.0 <= a <= b <= 1.0 for a, b in itertools.pairwise(values + [1.0]))
    assert values[-1] == float(c > 0)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int):
    with pytest.raises(ValueError):
        pass_at_k([n], [c], k)


def test_avg_at_n_takes_each_problem_with_its_own_number_of_samples():
    np.testing.assert_allclose(avg_at_n([4, 2, 8], [1, 2, 0]), [0.25, 1.0, 0.0])


# --------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    [  # 81 of 263, 15 of 148, 0 of 20, 1 of 29: Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0 / 20, 20, 0.0000, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_values(share: float, n: int, low: float, high: float):
    interval = wilson_interval(share, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("values", "method"),
    [
        ([1, 0, 1, 1], "wilson"),  # one 0/1 value per problem
        ([1] * 30, "wilson"),  # all right
        ([0] * 30, "wilson"),  # all wrong
        ([0.25] * 30, "wilson"),  # no spread
        ([0.5], "wilson"),  # one problem
        ([1], "wilson"),
        ([0.5, 0.25, 1.0], "guarded t"),
    ],
)
def test_the_interval_names_its_method_and_has_width(values: list[float], method: str):
    interval = mean_interval(values)
    assert interval.method == method
    assert interval.problems == len(values)
    assert interval.low <= interval.value <= interval.high
    assert interval.high - interval.low > 1 / (len(values) + 10)


@pytest.mark.parametrize("method", ["t", "bootstrap"])
@pytest.mark.parametrize("values", [[1.0] * 12, [0.0] * 12, [0.4]])
def test_methods_on_request_fall_back_where_there_is_no_spread(method: str, values: list[float]):
    assert mean_interval(values, method=method) == mean_interval(values)


def test_t_interval_by_hand():
    interval = mean_interval([0.2, 0.4, 0.9], method="t")
    error = math.sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2 / 3)
    assert interval.low == pytest.approx(max(0.5 - 4.302653 * error, 0), abs=1e-6)
    assert interval.high == pytest.approx(min(0.5 + 4.302653 * error, 1), abs=1e-6)
    interval = mean_interval([0.4, 0.5, 0.6] * 10, method="t")
    error = math.sqrt(20 * 0.01 / 29 / 30)
    assert interval.low == pytest.approx(0.5 - t_quantile(0.95, 29) * error, abs=1e-12)


def test_guarded_t_by_hand_and_with_many_problems_the_t_interval():
    interval = mean_interval([0.2, 0.4, 0.9])
    mean = (1.5 + 0.5) / 4  # half a problem with 1, half a one with 0
    squares = 0.3**2 + 0.1**2 + 0.4**2 + 0.5 * (0.5**2 + 0.5**2)
    assert interval.high == pytest.approx(min(mean + 4.302653 * math.sqrt(squares / 3 / 4), 1), abs=1e-6)
    values = np.random.default_rng(0).binomial(8, 0.5, size=20_000) / 8
    ours, t = mean_interval(values), mean_interval(values, method="t")
    assert (ours.low, ours.high) == pytest.approx((t.low, t.high), abs=3e-5)


def test_repeating_samples_within_problems_does_not_narrow_the_interval():
    correct = np.array([0, 1, 2, 2, 1, 0, 2, 1])
    once, often = avg_at_n([2] * 8, correct), avg_at_n([200] * 8, 100 * correct)
    assert mean_interval(once) == mean_interval(often)


def test_bootstrap_depends_on_its_seed_alone():
    values = np.random.default_rng(1).random(40)
    first, again, other = (mean_interval(values, method="bootstrap", seed=seed, draws=500) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.sampled_from(["auto", "t", "bootstrap"]))
def test_intervals_stay_within_0_and_1_and_hold_the_estimate(values: list[float], method: str):
    interval = mean_interval(values, method=method, draws=200)
    assert 0.0 <= interval.low <= interval.high <= 1.0
    if method != "bootstrap":
        assert interval.low - 1e-12 <= interval.value <= interval.high + 1e-12


@pytest.mark.parametrize("values", [[], [[0.5]], [1.5], [-0.1], [float("nan")]])
def test_values_outside_the_domain_are_refused(values: list):
    with pytest.raises(ValueError):
        mean_interval(values)


def _covered(draw, truth: float, repeats: int, **options) -> float:
    hits = 0
    for _ in range(repeats):
        interval = mean_interval(draw(), **options)
        hits += interval.low <= truth <= interval.high
    return hits / repeats


@pytest.mark.parametrize("problems", [20, 100])
@pytest.mark.parametrize("p", [0.03, 0.2, 0.5, 0.95])
def test_coverage_with_one_sample_per_problem(problems: int, p: float):
    rng = np.random.default_rng(problems)
    covered = _covered(lambda: rng.binomial(1, p, problems), p, 1500)
    assert 0.91 <= covered <= 0.995


@pytest.mark.parametrize(("problems", "samples"), [(15, 64), (30, 8), (30, 64), (100, 8), (256, 8)])
@pytest.mark.parametrize(
    ("a", "b"),
    [(0.02, 1), (0.05, 1), (0.2, 1), (0.3, 3), (0.08, 3.92), (0.5, 0.5), (3.6, 0.4), (1, 0.05)],
)
def test_the_interval_holds_at_least_94_percent_where_rates_differ_between_problems(
    a: float, b: float, problems: int, samples: int
):
    """Rates of problems are Beta(a, b): hardly any solved, rare, half of them all or nothing, hardly any unsolved."""
    rng = np.random.default_rng(7)

    def draw() -> np.ndarray:
        return rng.binomial(samples, rng.beta(a, b, size=problems)) / samples

    assert _covered(draw, a / (a + b), 1000) >= 0.94


def test_near_zero_the_default_covers_where_the_t_interval_does_not():
    rng = np.random.default_rng(11)
    samples = [rng.binomial(8, rng.beta(0.002 * 4, 0.998 * 4, size=256)) / 8 for _ in range(1500)]
    default = _covered(iter(samples).__next__, 0.002, 1500)
    t = _covered(iter(samples).__next__, 0.002, 1500, method="t")
    assert t < 0.90 < 0.93 < default


def test_ignoring_the_clusters_would_not_cover():
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(800):
        correct = rng.binomial(16, rng.beta(0.25, 0.25, size=60))
        interval = wilson_interval(correct.sum() / 960, 960)
        hits += interval.low <= 0.5 <= interval.high
    assert hits / 800 < 0.6


def test_coverage_of_the_bootstrap():
    rng = np.random.default_rng(9)
    covered = _covered(lambda: rng.binomial(8, rng.beta(1, 1, 60)) / 8, 0.5, 300, method="bootstrap", draws=400)
    assert covered >= 0.90


# ------------------------------------------------------------------------------------------------------- differences


def test_differences_over_seeds_are_a_plain_paired_t():
    base, other = [0.52, 0.47, 0.40], [0.60, 0.53, 0.51]
    found = difference_interval(base, other, method="t")
    differences = np.subtract(other, base)
    half = 4.302653 * differences.std(ddof=1) / 3**0.5  # t of two degrees of freedom
    assert [found.low, found.high] == pytest.approx([differences.mean() - half, differences.mean() + half], abs=1e-6)
    assert found.low > 0 > difference_interval(base, other).low  # the guard would hide what all three seeds say


def test_difference_interval_by_hand():
    interval = difference_interval([0.0, 0.5, 1.0, 0.25], [0.5, 0.5, 1.0, 0.75])
    squares = 2 * 0.3**2 + 2 * 0.2**2 + 0.5 * (1.2**2 + 0.8**2)  # half a problem at -1 and at 1: the mean is 0.2
    assert interval.value == pytest.approx(0.25)
    assert interval.low == pytest.approx(max(0.2 - 3.182446 * math.sqrt(squares / 4 / 5), -1), abs=1e-6)
    assert (interval.method, interval.problems) == ("paired t", 4)


@pytest.mark.parametrize(
    ("base", "other"),
    [
        ([1] * 30, [1] * 30),
        ([0] * 30, [1] * 30),
        ([1] * 30, [0] * 30),
        ([0.5] * 9, [0.25] * 9),
        ([0.5], [1.0]),
        ([0], [0]),
    ],
)
def test_equal_differences_do_not_give_certainty(base: list[float], other: list[float]):
    interval = difference_interval(base, other)
    assert interval.method == "wilson bound"
    assert -1.0 <= interval.low <= interval.value <= interval.high <= 1.0
    assert interval.high - interval.low > 1 / (len(base) + 1)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_difference_interval_stays_within_bounds_and_is_antisymmetric(pairs: list[tuple[float, float]]):
    base, other = zip(*pairs, strict=True)
    forth, back = difference_interval(base, other), difference_interval(other, base)
    assert -1.0 <= forth.low <= forth.high <= 1.0
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=1e-9)


def test_coverage_of_the_difference_interval():
    rng, hits, paired, unpaired = np.random.default_rng(3), 0, 0.0, 0.0
    for _ in range(1000):
        rates = rng.beta(0.5, 0.5, size=100)
        base = rng.binomial(8, rates) / 8
        other = rng.binomial(8, rates + 0.2 * (1 - rates)) / 8  # the mean moves from 0.5 to 0.6
        interval = difference_interval(base, other)
        hits += interval.low <= 0.1 <= interval.high
        paired += interval.high - interval.low
        unpaired += sum(end.high - end.low for end in (mean_interval(base), mean_interval(other)))
    assert hits / 1000 >= 0.94
    assert paired < 0.5 * unpaired


@pytest.mark.parametrize(
    ("better", "worse", "same", "expected"),
    [  # binomial tails: 2 * sum of C(m, i) / 2^m up to the rarer sign
        (0, 0, 10, 1.0),
        (5, 0, 3, 2 / 32),
        (9, 1, 0, 22 / 1024),
        (6, 6, 2, 1.0),
        (10, 2, 100, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_paired_test_of_0_1_values_is_the_exact_sign_test(better: int, worse: int, same: int, expected: float):
    base = [0] * better + [1] * worse + [1] * same
    other = [1] * better + [0] * worse + [1] * same
    test = paired_test(base, other)
    assert test.p == pytest.approx(expected)
    assert (test.method, test.changed) == ("exact sign test", better + worse)


def test_paired_test_enumerates_few_changes():
    base, other = [0.0, 0.0, 0.5, 0.5], [0.75, 0.5, 0.25, 0.5]
    sums = [a * 0.75 + b * 0.5 + c * 0.25 for a, b, c in itertools.product((-1, 1), repeat=3)]
    expected = np.mean([abs(total) >= 1.0 - 1e-12 for total in sums])
    test = paired_test(base, other)
    assert test.p == pytest.approx(expected)
    assert (test.method, test.changed) == ("exact sign flips", 3)


def test_random_sign_flips_approach_the_exact_answer():
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 4, size=15)
    differences = np.where(rng.random(15) < 0.7, 1, -1) * sizes / 4
    base, other = np.maximum(-differences, 0), np.maximum(differences, 0)
    signs = np.array(list(itertools.product((-1, 1), repeat=15)))
    exact = np.mean(np.abs(signs @ sizes) >= abs(differences.sum() * 4) - 1e-9)
    test = paired_test(base, other, seed=1)
    assert test.method == "random sign flips"
    assert test.p == pytest.approx(exact, abs=0.02)


def test_paired_test_seldom_rejects_a_true_null_and_finds_a_difference():
    rng = np.random.default_rng(4)

    def p_value(gain: float, seed: int) -> float:
        rates = rng.beta(1, 1, size=40)
        base, other = rng.binomial(4, rates) / 4, rng.binomial(4, rates + gain * (1 - rates)) / 4
        return paired_test(base, other, seed=seed, draws=400).p

    null = np.array([p_value(0.0, seed) for seed in range(500)])
    assert 0.01 <= np.mean(null <= 0.05) <= 0.075  # sums are discrete, so a little below the nominal 0.05
    assert 0.30 <= np.mean(null <= 0.5) <= 0.55
    assert np.mean([p_value(0.5, seed) <= 0.05 for seed in range(50)]) > 0.9


def test_pairs_need_equal_lengths():
    with pytest.raises(ValueError, match="paired"):
        difference_interval([0, 1], [0, 1, 1])
