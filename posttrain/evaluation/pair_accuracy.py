"""How often a reward prefers what people preferred, in numpy alone.

The unit is the prompt: pairs of one prompt share what makes it easy or hard, so a prompt counts once, with the mean
over its pairs, and intervals are those of `statistics`. A tie is neither right nor wrong. It stands apart, and in
`accuracy` it does not count as right.

People's preferences and rewards both depend on length, so an accuracy may be one of counting tokens. Two controls say
how much: the accuracy of preferring the longer (or the shorter) response, and `balanced`, the mean of the accuracies
where the chosen response is the longer one and where it is the shorter one. What looks at length only has 0.5 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.distributions import t_quantile
from posttrain.evaluation.statistics import Interval, PairedTest, difference_interval, mean_interval, paired_test

TIE = 1e-6
"""Scores that differ by no more are equal. For rewards with a scale, of the margin before it is scaled."""


LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over prompts with the ends of its 95% t interval; None with fewer than two prompts."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class PairAccuracy:
    """How often the chosen response comes out ahead.

    Attributes:
        pairs: number of pairs.
        ties: pairs whose scores are equal.
        accuracy: share of pairs with the larger score for the chosen response; a tie is not right.
        half: the same with ties counted as half right.
        decided: share of right ones among the pairs that are no ties; None if all are.
    """

    pairs: int
    ties: int
    accuracy: Interval
    half: float
    decided: float | None


@dataclass(frozen=True, slots=True)
class LengthControl:
    """That accuracy apart by which response is longer.

    Attributes:
        longer: accuracy where the chosen response is the longer one; None without such pairs.
        shorter: accuracy where it is the shorter one; None without such pairs.
        equal: number of pairs with responses of one length.
        balanced: mean of the two accuracies; None if one of them is missing.
        correlation: of margin and difference in length, by rank; None without spread in one of them.
    """

    longer: PairAccuracy | None
    shorter: PairAccuracy | None
    equal: int
    balanced: float | None
    correlation: float | None


def pair_accuracy(margins: Sequence[float], prompts: Sequence[str]) -> PairAccuracy:
    """Accuracy of a score.

    Args:
        margins: (P,) score of the chosen minus that of the rejected response, at least one.
        prompts: (P,) which prompt each pair belongs to.
    """
    values = np.asarray(margins, dtype=np.float64)
    if len(values) != len(prompts) or not len(values):
        raise ValueError(f"{len(values)} margins of {len(prompts)} pairs")
    ties = int((np.abs(values) <= TIE).sum())
    right = values > TIE
    decided = None if ties == len(values) else float(right.sum() / (len(values) - ties))
    half = float(np.mean(right + 0.5 * (np.abs(values) <= TIE)))
    return PairAccuracy(len(values), ties, mean_interval(by_prompt(right, prompts)), half, decided)


def length_control(margins: Sequence[float], lengths: Sequence[int], prompts: Sequence[str]) -> LengthControl:
    """Accuracy apart by which response is longer.

    Args:
        margins: as `pair_accuracy`.
        lengths: (P,) tokens of the chosen minus those of the rejected response.
        prompts: as `pair_accuracy`.
    """

    def where(chosen: NDArray[np.bool_]) -> PairAccuracy | None:
        index = np.flatnonzero(chosen).tolist()
        return pair_accuracy([margins[i] for i in index], [prompts[i] for i in index]) if len(index) else None

    difference = np.asarray(lengths)
    longer, shorter = where(difference > 0), where(difference < 0)
    balanced = None
    if longer is not None and shorter is not None:
        balanced = (longer.accuracy.value + shorter.accuracy.value) / 2
    return LengthControl(longer, shorter, int((difference == 0).sum()), balanced, rank_correlation(margins, lengths))


def compare_accuracies(
    base: Sequence[float], other: Sequence[float], prompts: Sequence[str]
) -> tuple[Interval, PairedTest]:
    """Accuracy of `other` minus that of `base` on the same pairs, with a paired test; margins as in `pair_accuracy`."""
    values = [by_prompt(np.asarray(margins, dtype=np.float64) > TIE, prompts) for margins in (base, other)]
    return difference_interval(*values), paired_test(*values)


def by_prompt(values: NDArray, prompts: Sequence[str]) -> NDArray[np.float64]:
    """(C,) mean of the values (P,) of each prompt, in the order in which the prompts first come."""
    groups: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        groups.setdefault(prompt, []).append(float(value))
    return np.array([sum(group) / len(group) for group in groups.values()])


def mean_over_prompts(values: NDArray[np.float64]) -> Mean:
    """Mean of one value per prompt, (C,), with its t interval; for values of any size and sign."""
    centre, count = float(values.mean()), len(values)
    if count < 2:
        return Mean(centre, None, None)
    reach = t_quantile(LEVEL, count - 1) * float(values.std(ddof=1)) / sqrt(count)
    return Mean(centre, centre - reach, centre + reach)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's, with mean ranks for equal values; None where one side has no spread."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
