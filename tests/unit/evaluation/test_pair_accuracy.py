"""Pair accuracy: ties apart, clusters, length."""

import numpy as np
import pytest

from posttrain.evaluation.pair_accuracy import (
    by_prompt,
    compare_accuracies,
    length_control,
    pair_accuracy,
    rank_correlation,
)

IMPLICIT, EXPLICIT = [0.3, -0.1, 0.0, 0.5], [0.2, 0.1, 0.4, -0.3]
PROMPTS = ["a", "b", "c", "d"]


def test_strict_half_and_decided():
    found = pair_accuracy(IMPLICIT, PROMPTS)
    assert (found.pairs, found.ties, found.accuracy.value, found.half) == (4, 1, 0.5, 0.625)
    assert found.decided == pytest.approx(2 / 3)
    assert pair_accuracy(EXPLICIT, PROMPTS).accuracy.value == 0.75


def test_paired_difference_of_the_two_rewards():
    interval, test = compare_accuracies(IMPLICIT, EXPLICIT, PROMPTS)
    assert interval.value == 0.25 and interval.problems == 4
    values = [by_prompt(np.array(margins) > 0, PROMPTS) for margins in (IMPLICIT, EXPLICIT)]
    error = np.std(values[1] - values[0], ddof=1) / 2
    assert error == pytest.approx(0.478713553878, abs=1e-12)
    # with 3 degrees of freedom t is 3.18, so that both ends are beyond what a difference can be
    assert (interval.low, interval.high) == (-1.0, 1.0)
    assert test.changed == 3 and test.p == 1.0
    six = compare_accuracies(IMPLICIT * 6, EXPLICIT * 6, [f"{p}{i}" for i in range(6) for p in PROMPTS])[0]
    assert six.low < 0.25 < six.high < 1


def test_shifts_and_scales_change_nothing():
    shifted = [(1.5 + m) - 1.5 for m in EXPLICIT]
    assert pair_accuracy(shifted, PROMPTS).accuracy == pair_accuracy(EXPLICIT, PROMPTS).accuracy
    assert pair_accuracy([10 * m for m in IMPLICIT], PROMPTS) == pair_accuracy(IMPLICIT, PROMPTS)


def test_all_ties():
    found = pair_accuracy([0.0, 1e-7, -1e-7], ["a", "b", "c"])
    assert found.ties == 3 and found.decided is None and found.accuracy.value == 0 and found.half == 0.5


def test_a_prompt_counts_once_whatever_its_pairs():
    margins, prompts = [1.0] * 9 + [-1.0], ["often"] * 9 + ["once"]
    found = pair_accuracy(margins, prompts)
    assert found.accuracy.value == 0.5 and found.accuracy.problems == 2 and found.pairs == 10
    assert by_prompt(np.array([1, 0, 1, 1]), ["a", "b", "a", "b"]).tolist() == [1.0, 0.5]


def test_intervals_grow_with_the_clusters():
    rng = np.random.default_rng(0)
    by = [float(rng.choice([-1, 1], p=[0.4, 0.6])) for _ in range(200)]
    alone = pair_accuracy(by, [str(i) for i in range(200)]).accuracy
    repeated = pair_accuracy(by * 4, [str(i) for i in range(200)] * 4).accuracy
    assert (repeated.low, repeated.high) == (alone.low, alone.high)


def test_a_score_that_is_length_has_no_balanced_accuracy():
    lengths = [3, 3, 3, -2, 0, -1]
    prompts = [str(i) for i in range(6)]
    control = length_control([float(n) for n in lengths], lengths, prompts)
    assert control.longer.accuracy.value == 1 and control.shorter.accuracy.value == 0 and control.equal == 1
    assert control.balanced == 0.5 and control.correlation == pytest.approx(1.0)
    assert pair_accuracy([float(n) for n in lengths], prompts).accuracy.value == 0.5


def test_strata_that_are_missing():
    control = length_control([1.0, -1.0], [4, 2], ["a", "b"])
    assert control.shorter is None and control.balanced is None and control.longer.pairs == 2
    assert length_control([1.0, -1.0], [2, 2], ["a", "b"]).correlation is None


def test_rank_correlation_with_equal_values():
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1.0)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert rank_correlation([0, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5.0))


@pytest.mark.parametrize("margins", [[], [1.0, 2.0]])
def test_a_prompt_for_every_margin(margins):
    with pytest.raises(ValueError, match="margins of"):
        pair_accuracy(margins, ["a"] if margins else [])
