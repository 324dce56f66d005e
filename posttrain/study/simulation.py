"""What a sequential test does where the truth is known: false differences, the best arm found, seeds spent.

`python -m posttrain.study.simulation` prints the table of sequential tests of docs/statistics.md, and with `errors`
behind it that of the error alone, of many more studies.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.sequential import (
    SequentialPlan,
    SequentialResult,
    arrangements,
    order_of_pair,
    sequential_test,
    spending,
)
from posttrain.evaluation.statistics import wilson_interval
from posttrain.terminal import say

GAP = 3.0
"""Distance of arms that differ, in standard deviations over seeds."""

COLLAPSES = 0.3
"""Share of the seeds that fail where scores are `broken`: their score is 4 standard deviations lower."""

TRUTHS = {
    "all alike": lambda arms: np.zeros(arms),
    "one ahead": lambda arms: np.eye(arms)[0] * GAP,
    "a pair ahead": lambda arms: np.eye(arms)[:2].sum(axis=0) * GAP,
    "a ladder": lambda arms: np.arange(arms)[::-1] * GAP,
}
"""Mean score of each arm, by name, best first."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What was counted over many studies.

    Attributes:
        studies: number of them.
        wrong: those in which two arms that are alike were told apart, or two that differ the wrong way round.
        best: those in which the best arm was found better than every other; None where several are best.
        seeds: mean over the studies, of all arms together.
        fixed: what as many looks at all arms would take.
    """

    studies: int
    wrong: int
    best: int | None
    seeds: float
    fixed: int

    @property
    def saved(self) -> float:
        """Share of the seeds of a fixed number that were not needed."""
        return 1.0 - self.seeds / self.fixed


def simulate(
    plan: SequentialPlan, means: Sequence[float], studies: int, *, broken: bool = False, seed: int = 0
) -> Simulated:
    """Run a plan on scores with known means.

    Args:
        plan: of the test.
        means: of the arms, in standard deviations over seeds.
        studies: how many.
        broken: a share of the seeds of every arm fails, so that scores have two modes; otherwise they are normal.
        seed: of the scores and the permutations.
    """
    rng, truth = np.random.default_rng(seed), np.asarray(means, dtype=np.float64)
    wrong = best = 0
    seeds = 0.0
    top = np.flatnonzero(truth == truth.max())
    for number in range(studies):
        values = rng.normal(size=(len(truth), plan.seeds)) + truth[:, None]
        if broken:
            values -= 4.0 * (rng.random(values.shape) < COLLAPSES)
        scores = {str(arm): list(row) for arm, row in enumerate(values)}
        result = sequential_test(scores, replace(plan, seed=seed + number))
        won = set(_won(result))
        wrong += any(truth[winner] <= truth[loser] for winner, loser in won)
        best += all((top[0], loser) in won for loser in range(len(truth)) if loser != top[0])
        seeds += sum(_looks_of(arm, result, plan) for arm in range(len(truth))) * plan.seeds_per_look
    return Simulated(studies, wrong, best if len(top) == 1 else None, seeds / studies, plan.seeds * len(truth))


def false_differences(scores: NDArray[np.float64], plan: SequentialPlan) -> int:
    """Studies in which any two arms are told apart, as `sequential_test` would, for many studies at once.

    Until the first decision all pairs are open in every study, so boundaries depend on the scores alone.

    Args:
        scores: (studies, arms, seeds), of arms that are alike.
        plan: its arrangements are shared by these studies.
    """
    studies, arms, _ = scores.shape
    pairs, n = list(combinations(range(arms), 2)), plan.seeds_per_look
    wrong, spent = np.zeros(studies, dtype=bool), np.zeros(studies)
    passed: list[NDArray[np.float64]] = []  # per look: what an arrangement must exceed to cross, by study
    for look, allowed in enumerate(spending(plan.alpha, plan.looks, len(pairs)), start=1):
        chosen = arrangements(plan, look, all_of_them=len(pairs) == 1)
        largest = np.zeros((look, len(chosen), studies))
        for number, pair in enumerate(pairs):
            own, total = chosen[order_of_pair(plan, number, len(chosen))].astype(np.float64), 0.0
            for group in range(look):
                columns = slice(group * n, (group + 1) * n)
                values = np.concatenate([scores[:, arm, columns] for arm in pair], axis=1)
                total = total + own[:, group] @ values.T / n
                np.maximum(largest[group], np.round(np.abs(total), 12), out=largest[group])
        alive = np.ones((len(chosen), studies), dtype=bool)
        for edge, before in zip(passed, largest, strict=False):
            alive &= before <= edge
        last = np.where(alive, largest[-1], -1.0)
        cross = np.floor((allowed - spent) * len(chosen) + 1e-9).astype(int)
        edge = -np.sort(-last, axis=0)[cross, np.arange(studies)]
        wrong |= alive[0] & (last[0] > edge)
        spent += (last > edge).mean(axis=0)
        passed.append(edge)
    return int(wrong.sum())


def _won(result: SequentialResult) -> Iterator[tuple[int, int]]:
    """(winner, loser) of every decided pair."""
    for each in result.decisions:
        if each.outcome in ("first", "second"):
            pair = int(each.first), int(each.second)
            yield pair if each.outcome == "first" else (pair[1], pair[0])


def _looks_of(arm: int, result: SequentialResult, plan: SequentialPlan) -> int:
    """Looks that an arm got seeds for: until its last pair was decided, or it lost where losers stop."""
    own = [each for each in result.decisions if str(arm) in (each.first, each.second)]
    lost = [
        each.look
        for each in own
        if each.look is not None and (each.first if each.outcome == "second" else each.second) == str(arm)
    ]
    if plan.drop_losers and lost:
        return min(lost)
    looks = [each.look or plan.looks for each in own if each.outcome != "stopped"]
    # A pair that was stopped ended when the other arm lost.
    stopped = [
        _looks_of(_other(arm, each.first, each.second), result, plan) for each in own if each.outcome == "stopped"
    ]
    return max([*looks, *stopped])


def _other(arm: int, first: str, second: str) -> int:
    return int(second) if first == str(arm) else int(first)


def table(studies: int, arms: Sequence[int] = (2, 4), draws: int = 1000) -> Iterator[str]:
    """Lines of Markdown: arms, truth, rule, false differences, best arm found, seeds saved."""
    head = ["arms", "truth", "stop", "any false difference [95%]", "best arm found", "seeds saved"]
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for number in arms:
        for broken, names in ((False, list(TRUTHS)), (True, ["all alike"])):
            for name in names:
                means: NDArray[np.float64] = TRUTHS[name](number)
                for rule in ("losers", "decided"):
                    plan = SequentialPlan(draws=draws, drop_losers=rule == "losers")
                    if number == 2 and (rule == "losers" or name in ("a pair ahead", "a ladder")):
                        continue  # with two arms the rules are one, and these truths are others
                    found = simulate(plan, list(means), studies, broken=broken)
                    share = wilson_interval(found.wrong / studies, studies)
                    best = "-" if found.best is None else f"{found.best / studies:.1%}"
                    error = f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"
                    label = f"{name}, {COLLAPSES:.0%} of the seeds fail" if broken else name
                    yield f"| {number} | {label} | {rule} | {error} | {best} | {found.saved:.0%} |"


def errors(studies: int, draws: int = 2000, at_once: int = 100) -> Iterator[str]:
    """Lines of Markdown: arms that are alike, looks, seeds a look, scores, any false difference."""
    yield "| arms, all alike | looks | seeds a look | scores | any false difference [95%] |"
    yield "| --- | --- | --- | --- | --- |"
    for arms, looks, seeds in ((4, 1, 5), (3, 1, 5), (10, 1, 5), (2, 5, 3), (4, 5, 3)):
        for broken in (False, True):
            wrong = 0
            for number in range(studies // at_once):
                rng = np.random.default_rng([number, arms, looks, broken])
                scores = rng.normal(size=(at_once, arms, looks * seeds))
                if broken:
                    scores -= 4.0 * (rng.random(scores.shape) < COLLAPSES)
                wrong += false_differences(scores, SequentialPlan(seeds, looks, draws=draws, seed=number))
            share = wilson_interval(wrong / studies, studies)
            kind = f"{COLLAPSES:.0%} of the seeds fail" if broken else "normal"
            error = f"{share.value:.2%} [{share.low:.2%}, {share.high:.2%}]"
            yield f"| {arms} | {looks} | {seeds} | {kind} | {error} of {studies:,} |"


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=("table", "errors"), default="table")
    parser.add_argument("--studies", type=int, help="of each line; default: 4,000 of the table, 32,000 of the errors")
    given = parser.parse_args()
    for line in errors(given.studies or 32_000) if given.table == "errors" else table(given.studies or 4000):
        say(line)


if __name__ == "__main__":
    main()
