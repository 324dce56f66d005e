"""The sequential test: exact small cases, its error rate by simulation, and what a plan allows."""

import itertools
import math

import numpy as np
import pytest

from posttrain.errors import DataError, RecipeError
from posttrain.evaluation.sequential import (
    SequentialPlan,
    SequentialResult,
    first_useful_look,
    permutation_p,
    seeds_needed,
    sequential_test,
    spending,
)


def _outcomes(result: SequentialResult) -> dict[tuple[str, str], tuple[str, int | None]]:
    return {(decision.first, decision.second): (decision.outcome, decision.look) for decision in result.decisions}


def test_the_error_is_spent_evenly():
    assert spending(0.05, 5) == pytest.approx((0.01, 0.02, 0.03, 0.04, 0.05))
    assert spending(0.05, 5, pairs=3) == pytest.approx((0.008, 0.016, 0.024, 0.032, 0.04))


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        ([1, 2, 3], [4, 5, 6], 2 / 20),
        ([4, 5, 6], [1, 2, 3], 2 / 20),
        ([1, 2, 4], [3, 5, 6], 4 / 20),
        ([1, 1, 1], [1, 1, 1], 1.0),
        ([0.1, 0.2], [0.3, 0.4, 0.5], 2 / 10),
    ],
)
def test_permutation_p_by_hand(first: list[float], second: list[float], p: float):
    assert permutation_p(first, second) == pytest.approx(p)


@pytest.mark.parametrize(
    ("seeds_per_look", "looks", "alpha", "first"),
    [
        (5, 5, 0.05, 1),  # 2 of 252 permutations are 0.8%, of 1%
        (4, 5, 0.05, 2),  # 2 of 70 are 2.9%; 2 of 4,900 are 0.04%
        (3, 5, 0.05, 2),
        (2, 5, 0.05, 3),
        (1, 5, 0.05, None),  # 2 of 32 are 6%
        (3, 1, 0.05, None),
        (3, 1, 0.10, 1),
    ],
)
def test_a_plan_says_when_it_can_decide(seeds_per_look: int, looks: int, alpha: float, first: int | None):
    assert first_useful_look(SequentialPlan(seeds_per_look, looks, alpha)) == first


def test_one_look_is_the_permutation_test():
    rng = np.random.default_rng(0)
    plan = SequentialPlan(seeds_per_look=4, looks=1, alpha=0.1)
    decided = []
    for shift in np.linspace(0, 3, 40):
        first, second = rng.normal(size=4), rng.normal(size=4) + shift
        (decision,) = sequential_test({"a": first, "b": second}, plan).decisions
        decided.append(decision.outcome != "not separated")
        assert decided[-1] == (permutation_p(first, second) <= 0.1)
    assert 5 < sum(decided) < 35


def test_two_looks_by_enumeration():
    """The second look counts the arrangements of both groups that the first did not decide."""
    plan = SequentialPlan(seeds_per_look=3, looks=2, alpha=0.3, draws=1000)
    rng = np.random.default_rng(1)
    for _ in range(30):
        first, second = rng.normal(size=6), rng.normal(size=6) + 0.8
        sums = []
        for group in (slice(0, 3), slice(3, 6)):
            pooled = np.concatenate([first[group], second[group]])
            sums.append(
                [(2 * pooled[list(rows)].sum() - pooled.sum()) / 3 for rows in itertools.combinations(range(6), 3)]
            )
        one = np.abs(sums[0])
        boundary = min((value for value in one if np.mean(one >= value - 1e-9) <= 0.15), default=math.inf)
        expected = ("second" if sums[0][0] < 0 else "first", 1) if one[0] >= boundary - 1e-9 else None
        if expected is None:
            spent = np.mean(one >= boundary - 1e-9)
            both = np.array([abs(a + b) if abs(a) < boundary - 1e-9 else -1.0 for a, b in itertools.product(*sums)])
            rare = spent + np.mean(both >= both[0] - 1e-9) <= 0.3
            expected = (("second" if sums[0][0] + sums[1][0] < 0 else "first"), 2) if rare else ("not separated", None)
        assert _outcomes(sequential_test({"a": first, "b": second}, plan))["a", "b"] == expected


def test_large_differences_are_found_at_the_first_useful_look_and_by_sign():
    scores = {"low": [0.1, 0.2, 0.15] * 2, "high": [0.9, 0.8, 0.95] * 2, "other": [0.91, 0.79, 0.94] * 2}
    result = sequential_test(scores, SequentialPlan(3, 5))
    outcomes = _outcomes(result)
    assert outcomes["low", "high"] == ("second", 2)
    assert outcomes["low", "other"] == ("second", 2)
    assert outcomes["high", "other"] == ("undecided", None)
    assert result.looks == 2
    assert result.boundaries[0] is None  # three seeds of each cannot decide at 1%
    assert 0 < result.spent <= 0.02 + 1e-9


def test_earlier_decisions_stay_when_seeds_are_added_and_decided_methods_need_none():
    rng = np.random.default_rng(3)
    scores = {"a": rng.normal(size=15), "b": rng.normal(size=15) + 4, "c": rng.normal(size=15)}
    plan = SequentialPlan(3, 5, draws=3000)
    before: dict = {}
    for seeds in (0, 3, 6, 7, 9, 15):
        given = {name: found[: 6 if name == "b" and seeds > 6 else seeds] for name, found in scores.items()}
        result = sequential_test(given, plan)
        decided = {pair: found for pair, found in _outcomes(result).items() if found[1] is not None}
        assert before.items() <= decided.items()
        before = decided
    assert before["a", "b"][0] == "second"
    assert _outcomes(result)["a", "c"] == ("not separated", None)


def test_scores_have_no_unit():
    rng = np.random.default_rng(4)
    scores = {"a": rng.normal(size=9), "b": rng.normal(size=9) + 1.2}
    plan = SequentialPlan(3, 3, alpha=0.2)
    once = sequential_test(scores, plan)
    scaled = sequential_test({name: 1e4 * found for name, found in scores.items()}, plan)
    assert _outcomes(once) == _outcomes(scaled)
    assert scaled.decisions[0].difference == pytest.approx(1e4 * once.decisions[0].difference)


def test_equal_scores_are_never_told_apart():
    result = sequential_test({"a": [0.5] * 15, "b": [0.5] * 15}, SequentialPlan(3, 5, draws=500))
    assert _outcomes(result) == {("a", "b"): ("not separated", None)}


def _false_differences(methods: int, plan: SequentialPlan, repeats: int, shift: float = 0.0) -> tuple[float, float]:
    """Share of repeats with a false difference, and with a true one (of the last method) that was found."""
    rng, wrong, found = np.random.default_rng(1), 0, 0
    for seed in range(repeats):
        scores = {f"m{i}": rng.normal(size=plan.seeds) for i in range(methods)}
        scores[f"m{methods - 1}"] += shift
        drawn = SequentialPlan(plan.seeds_per_look, plan.looks, plan.alpha, plan.draws, seed)
        decided = {pair: look for pair, (_, look) in _outcomes(sequential_test(scores, drawn)).items() if look}
        true = {pair for pair in decided if shift and f"m{methods - 1}" in pair}
        wrong += len(decided) > len(true)
        found += bool(true)
    return wrong / repeats, found / repeats


@pytest.mark.parametrize(
    ("methods", "plan", "shift"),
    [
        (2, SequentialPlan(5, 1, draws=20_000), 0.0),
        (2, SequentialPlan(3, 5, draws=1000), 0.0),
        (3, SequentialPlan(3, 5, draws=1000), 0.0),
        (4, SequentialPlan(3, 3, draws=1000), 5.0),  # one method differs: no excuse for the others
    ],
)
def test_the_error_rate_is_kept(methods: int, plan: SequentialPlan, shift: float):
    wrong, found = _false_differences(methods, plan, 400, shift)
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert found == (1.0 if shift else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("methods", "shift"), [(2, 0.0), (3, 0.0), (4, 0.0), (4, 5.0)])
def test_the_error_rate_is_kept_and_used(methods: int, shift: float):
    wrong, _ = _false_differences(methods, SequentialPlan(3, 5, draws=2000), 2000, shift)
    assert 0.03 <= wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_looking_without_a_plan_would_not_keep_it():
    rng, wrong = np.random.default_rng(2), 0
    for _ in range(200):
        first, second = rng.normal(size=15), rng.normal(size=15)
        looks = [(first[:n], second[:n]) for n in (5, 6, 7)]
        wrong += any(permutation_p(*look) <= 0.05 for look in looks)
    assert wrong / 200 > 0.06


def test_a_difference_is_found_with_fewer_seeds_if_it_is_large():
    rng = np.random.default_rng(6)
    used = {}
    for shift in (1.5, 4.0):
        looks = []
        for seed in range(40):
            scores = {"a": rng.normal(size=15), "b": rng.normal(size=15) + shift}
            looks.append(sequential_test(scores, SequentialPlan(3, 5, draws=1000, seed=seed)).decisions[0].look)
        used[shift] = np.mean([look or 6 for look in looks])
        assert sum(look is not None for look in looks) / 40 > 0.85
    assert used[4.0] < used[1.5]


@pytest.mark.parametrize(
    ("scores", "plan", "error", "message"),
    [
        ({"a": [1.0], "b": [2.0]}, SequentialPlan(1, 5), RecipeError, "never tell"),
        ({"a": [1.0]}, SequentialPlan(3, 5), DataError, "two methods"),
        ({"a": [1.0], "b": [math.nan]}, SequentialPlan(3, 5), DataError, "finite"),
    ],
)
def test_what_cannot_be_tested_is_refused(scores: dict, plan: SequentialPlan, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        sequential_test(scores, plan)


def test_seeds_needed_by_hand_and_by_simulation():
    # Both spreads are 1 and so is the difference: 2 (1.96 + 0.8416)^2 = 15.7
    first, second = [0.0, 2.0, 0.0, 2.0, 1.0], [1.0, 3.0, 1.0, 3.0, 2.0]
    squares = 2 * 4.0 / 8
    assert seeds_needed(first, second, alpha=0.05) == math.ceil(2 * (1.959964 + 0.841621) ** 2 * squares)
    assert seeds_needed(first, second, alpha=0.05, pairs=3) > seeds_needed(first, second, alpha=0.05)
    assert seeds_needed([1.0, 2.0], [2.0, 1.0], alpha=0.05) is None
    assert seeds_needed([1.0, 1.0], [2.0, 2.0], alpha=0.05) == 2
    rng = np.random.default_rng(8)
    needed = 12  # of each, for a difference of 1.2 standard deviations at 5%: 2 * 7.849 / 1.44 = 10.9, and some more
    separated = 0
    for seed in range(100):
        scores = {"a": rng.normal(size=needed), "b": rng.normal(size=needed) + 1.2}
        separated += sequential_test(scores, SequentialPlan(needed, 1, draws=1000, seed=seed)).decisions[0].look == 1
    assert 0.68 <= separated / 100 <= 0.95
