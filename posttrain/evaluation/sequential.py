"""Comparing several methods with as few seeds as needed: group-sequential permutation tests, as AdaStop does it.

Seeds come in groups of `seeds_per_look`. After each group every pair of methods that is still undecided is looked at.
The family-wise error, the probability that any two methods that are alike are told apart, at any look, is to stay at
`alpha`; so `alpha * k / looks` of it may be spent up to look k, and of several pairs `SHARE` of that. Within a group,
values of two methods that are alike could be exchanged, which gives the distribution of the largest difference over all
undecided pairs; what was ruled out at earlier looks is left out of it. The pair with the largest difference is decided
first, then the others are looked at without it (step-down). Mathieu et al. 2023, AdaStop, arXiv 2306.10882.

Arrangements of different pairs are drawn independently of each other. With the same one for all pairs, all are at what
was seen together, which makes a large maximum look rarer than it is: with four methods that are alike and five looks at
three seeds, a difference was found at 5% in 5.6% [5.1, 6.1] of 8,000 comparisons, and in 5.0% [4.5, 5.7] of 5,000 with
independent ones. Of few arrangements each pair draws many times, not each once: the largest of several pairs has far
more values than one pair has arrangements (docs/statistics.md has both).

Why not the package of that name: its version 0.1.3 compares the absolute difference with quantiles of the signed one,
so the error is twice the level asked for (tests/unit/evaluation/test_sequential.py has the simulation that finds 5% of
5% here); it keeps at most C(2n, n) permutations once there are too many to enumerate, which is coarse; and it takes
seconds for a comparison, too slow to simulate.

Everything here is a function of the scores and the plan: the same seeds give the same decisions, and earlier decisions
stay when seeds are added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import DataError, RecipeError
from posttrain.evaluation.distributions import normal_quantile

SHARE = 0.8
"""Of alpha, spent where there are several pairs.

A pair that differs by chance widens its own arrangements, not those of the others. So the largest of several is beyond
its boundary too often: at all of alpha 5% four methods that are alike were told apart in 5.8% [5.5, 6.0] of 32,000
comparisons. docs/statistics.md has what is left of it.
"""

Outcome = Literal["first", "second", "undecided", "not separated", "stopped"]


@dataclass(frozen=True, slots=True)
class SequentialPlan:
    """What must be fixed before the first look, and stay.

    Attributes:
        seeds_per_look: seeds of each method per group, n.
        looks: number of looks at most, K.
        alpha: family-wise error over all pairs and looks.
        draws: permutations; those of two methods are enumerated where there are no more than this.
        seed: of the random permutations.
        drop_losers: a method that was found worse than another is asked no further; for who only wants the best. The
            error stays: what is dropped could only have added to it, and a method that is no loser is dropped only
            after an error.
    """

    seeds_per_look: int = 3
    looks: int = 5
    alpha: float = 0.05
    draws: int = 20_000
    seed: int = 0
    drop_losers: bool = False

    @property
    def seeds(self) -> int:
        """Seeds of each method at the last look."""
        return self.seeds_per_look * self.looks


@dataclass(frozen=True, slots=True)
class Decision:
    """What is known of a comparison after some seeds.

    Attributes:
        first: a method.
        second: another one.
        outcome: which of the two is better; `undecided` if there are looks left; `not separated` after the last look;
            `stopped` if it was not asked further, as one of them had lost to another method.
        look: the look that decided, from 1; None if none did.
        difference: mean of `first` - mean of `second`, over the seeds up to that look, or to the last; None before any.
    """

    first: str
    second: str
    outcome: Outcome
    look: int | None
    difference: float | None


@dataclass(frozen=True, slots=True)
class SequentialResult:
    """What a sequential test has found so far.

    Attributes:
        looks: looks that the seeds are enough for.
        decisions: one per pair, in the order of the methods.
        boundaries: difference (summed over the groups) that decides, at each look, for the pairs left undecided then;
            None where no difference would have.
        spent: family-wise error spent.
    """

    looks: int
    decisions: tuple[Decision, ...]
    boundaries: tuple[float | None, ...]
    spent: float


def spending(alpha: float, looks: int, pairs: int = 1) -> tuple[float, ...]:
    """Error that may be spent up to each look: alpha * k / looks, and of several pairs `SHARE` of that."""
    share = SHARE if pairs > 1 else 1.0
    return tuple(share * alpha * look / looks for look in range(1, looks + 1))


def permutation_p(first: ArrayLike, second: ArrayLike) -> float:
    """Exact two-sided permutation p-value of the difference of means, over all ways to choose the first group."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    pooled, n = np.concatenate([first, second]), len(first)
    chosen = np.array([pooled[list(rows)].sum() for rows in combinations(range(len(pooled)), n)])
    differences = np.abs(chosen / n - (pooled.sum() - chosen) / len(second))
    return float((differences >= differences[0] - 1e-12 * max(1.0, np.abs(pooled).max())).mean())


def first_useful_look(plan: SequentialPlan) -> int | None:
    """The first look at which the largest possible difference is rare enough to decide; None if there is none."""
    arrangements = math.comb(2 * plan.seeds_per_look, plan.seeds_per_look)
    budgets = enumerate(spending(plan.alpha, plan.looks), start=1)
    return next((look for look, budget in budgets if 2 / arrangements**look <= budget), None)


def sequential_test(scores: Mapping[str, Sequence[float]], plan: SequentialPlan) -> SequentialResult:
    """Look at all complete groups, in the order of the seeds.

    Args:
        scores: method -> one score per seed, in the order in which the seeds were run; at least two methods. A decided
            method needs no further seeds.
        plan: as fixed before the first look.

    Raises:
        RecipeError: the plan could never decide anything.
        DataError: fewer than two methods, or a score that is not finite.
    """
    if first_useful_look(plan) is None:
        raise RecipeError(
            f"{plan.looks} looks at {plan.seeds_per_look} seeds can never tell methods apart at alpha {plan.alpha:g}",
            where="seeds_per_look",
            hint="raise seeds_per_look or looks",
        )
    values = {name: np.asarray(found, dtype=np.float64) for name, found in scores.items()}
    if len(values) < 2 or not all(np.isfinite(found).all() for found in values.values()):
        raise DataError("a comparison needs at least two methods with finite scores", where=", ".join(values))
    test = _Test(values, plan)
    while test.ready():
        test.look()
    return test.result()


def seeds_needed(
    first: Sequence[float], second: Sequence[float], *, alpha: float, pairs: int = 1, power: float = 0.8
) -> int | None:
    """Seeds of each method that would tell the two apart with probability `power`, if what was seen is the truth.

    The usual formula for two normal samples, n = 2 (z_alpha + z_power)^2 s^2 / d^2, with the difference d and the
    pooled spread s of the scores, and `alpha` shared by the pairs. A rough guide: d and s are themselves uncertain.

    Returns:
        None where no number of seeds would do: there is no difference at all.
    """
    ours, theirs = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    difference = float(ours.mean() - theirs.mean())
    if difference == 0.0:
        return None
    freedom = len(first) + len(second) - 2
    if freedom < 1:
        raise ValueError("need at least three scores to estimate a spread")
    squares = ((ours - ours.mean()) ** 2).sum() + ((theirs - theirs.mean()) ** 2).sum()
    reach = normal_quantile(1.0 - alpha / pairs) + normal_quantile(2.0 * power - 1.0)
    return max(2, math.ceil(2.0 * reach**2 * squares / freedom / difference**2))


Pair = tuple[str, str]


class _Test:
    """The state between looks."""

    def __init__(self, values: dict[str, NDArray[np.float64]], plan: SequentialPlan) -> None:
        self.plan = plan
        # One scale for all, and rounding, so that equal differences are equal.
        self.scale = max([float(np.abs(found).max()) for found in values.values() if len(found)] or [1.0]) or 1.0
        self.values = {name: found / self.scale for name, found in values.items()}
        self.open: list[Pair] = list(combinations(values, 2))
        self.pairs = tuple(self.open)
        self.decided: dict[Pair, tuple[Outcome, int]] = {}
        self.stopped: dict[Pair, int] = {}
        self.passed: list[tuple[tuple[Pair, ...], float]] = []  # per look: pairs left open, and their boundary
        self.spent = 0.0

    def ready(self) -> bool:
        """Whether there is a next look, and every open pair has the seeds for it."""
        look = len(self.passed) + 1
        wanted = look * self.plan.seeds_per_look
        return (
            look <= self.plan.looks
            and bool(self.open)
            and all(len(self.values[name]) >= wanted for pair in self.open for name in pair)
        )

    def look(self) -> None:
        look = len(self.passed) + 1
        chosen = arrangements(self.plan, look, all_of_them=len(self.pairs) == 1)
        alive = self._alive(chosen)
        budget = spending(self.plan.alpha, self.plan.looks, len(self.pairs))[look - 1] - self.spent
        differences = {pair: self._differences(pair, chosen)[:, -1] for pair in self.open}
        while True:
            largest = np.max([differences[pair] for pair in self.open], axis=0)[alive]
            boundary, share = _boundary(largest, budget, len(chosen))
            pair = max(self.open, key=lambda pair: differences[pair][0])
            if differences[pair][0] < boundary:
                self.spent += share
                break
            self.decided[pair] = ("first" if self._mean_difference(pair, look) > 0 else "second", look)
            self.open.remove(pair)
            if not self.open:
                break
        self.passed.append((tuple(self.open), boundary))
        if self.plan.drop_losers:
            lost = {pair[0] if outcome == "second" else pair[1] for pair, (outcome, _) in self.decided.items()}
            self.stopped |= {pair: look for pair in self.open if lost.intersection(pair)}
            self.open = [pair for pair in self.open if pair not in self.stopped]

    def _alive(self, chosen: NDArray[np.int8]) -> NDArray[np.bool_]:
        """Arrangements that had crossed no boundary at an earlier look."""
        alive = np.ones(len(chosen), dtype=bool)
        for look, (pairs, boundary) in enumerate(self.passed, start=1):
            for pair in pairs:
                alive &= self._differences(pair, chosen[:, :look])[:, -1] < boundary
        return alive

    def _differences(self, pair: Pair, chosen: NDArray[np.int8]) -> NDArray[np.float64]:
        """|sum of the groups' differences| up to each look, (P, look); the first row is what was seen."""
        n, looks = self.plan.seeds_per_look, chosen.shape[1]
        chosen = chosen[order_of_pair(self.plan, self.pairs.index(pair), len(chosen))]
        groups = [self.values[name][: n * looks].reshape(looks, n) for name in pair]
        per_group = np.einsum("plj,lj->pl", chosen, np.concatenate(groups, axis=1)) / n
        return np.round(np.abs(per_group.cumsum(axis=1)), 12)

    def _mean_difference(self, pair: Pair, looks: int) -> float:
        seeds = self.plan.seeds_per_look * looks
        first, second = (self.values[name][:seeds].mean() for name in pair)
        return float(first - second)

    def result(self) -> SequentialResult:
        done = len(self.passed)
        rest: Outcome = "not separated" if done == self.plan.looks else "undecided"
        decisions = []
        for pair in self.pairs:
            outcome, look = self.decided.get(pair, ("stopped" if pair in self.stopped else rest, None))
            seen = look or self.stopped.get(pair, done)
            difference = self._mean_difference(pair, seen) * self.scale if done else None
            decisions.append(Decision(*pair, outcome, look, difference))
        boundaries = tuple(None if math.isinf(edge) else edge * self.scale for _, edge in self.passed)
        return SequentialResult(done, tuple(decisions), boundaries, self.spent)


def order_of_pair(plan: SequentialPlan, number: int, arrangements: int) -> NDArray[np.intp]:
    """Which arrangement each row is for a pair, by its number; the first row is how it was for all of them."""
    order = np.arange(arrangements)
    if number:  # a single pair needs no shuffling
        order[1:] = np.random.default_rng([plan.seed, arrangements, number]).permutation(order[1:])
    return order


def arrangements(plan: SequentialPlan, looks: int, *, all_of_them: bool) -> NDArray[np.int8]:
    """Which method each value of each group is given to, (P, looks, 2n), +1 or -1; the first is how it was.

    Args:
        plan: seeds per look, and how many to draw.
        looks: groups so far.
        all_of_them: each once, if there are no more than are drawn.
    """
    n = plan.seeds_per_look
    ways = math.comb(2 * n, n)
    if all_of_them and ways**looks <= plan.draws:
        block = np.full((ways, 2 * n), -1, dtype=np.int8)
        for row, chosen in enumerate(combinations(range(2 * n), n)):
            block[row, list(chosen)] = 1
        return block[np.array(list(product(range(ways), repeat=looks)))]
    asis = np.repeat(np.array([1, -1], dtype=np.int8), n)
    rng = np.random.default_rng([plan.seed, looks])
    drawn = rng.permuted(np.broadcast_to(asis, (plan.draws - 1, looks, 2 * n)).copy(), axis=-1)
    return np.concatenate([np.broadcast_to(asis, (1, looks, 2 * n)), drawn])


def _boundary(alive: NDArray[np.float64], budget: float, total: int) -> tuple[float, float]:
    """The smallest value that at most `budget` of all `total` arrangements reach, and the share that does."""
    values, counts = np.unique(alive, return_counts=True)
    tail = counts[::-1].cumsum()[::-1] / total
    allowed = np.flatnonzero(tail <= budget + 1e-12)
    if len(allowed) == 0:
        return math.inf, 0.0
    return float(values[allowed[0]]), float(tail[allowed[0]])
