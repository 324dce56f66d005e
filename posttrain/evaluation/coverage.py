"""What intervals cover, by simulation: `python -m posttrain.evaluation.coverage [--repeats 2000]`.

Prints the tables of intervals of docs/statistics.md; `posttrain.study.simulation` does so for tests. Problems have
rates of their own (Beta), or two kinds of rates, or one; each is sampled n times, and the interval of the mean rate is
checked against the truth. Differences: two models on the same problems, alike (the second adds nothing) or not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.informative import informative_shares
from posttrain.evaluation.statistics import difference_interval, mean_interval
from posttrain.terminal import say

# name, parameters of Beta(a, b); or (share of problems, their rate), the others 0
BETAS = {
    "Beta(.02, 1): hardly any solved": (0.02, 1.0),
    "Beta(.05, 1): rare": (0.05, 1.0),
    "Beta(.1, 1)": (0.1, 1.0),
    "Beta(.2, 1)": (0.2, 1.0),
    "Beta(.3, 3): rare, none easy": (0.3, 3.0),
    "Beta(.5, .5)": (0.5, 0.5),
    "Beta(5, 5): alike": (5.0, 5.0),
    "Beta(1, .05): hardly any unsolved": (1.0, 0.05),
}
TWO = {
    "a tenth at 1/2, others 0": (0.1, 0.5),
    "3% at 0.3, others 0": (0.03, 0.3),
    "a fifth at 0.02, others 0": (0.2, 0.02),
    "all at 0.02": (1.0, 0.02),
    "all at 1/2": (1.0, 0.5),
}
SIZES = ((15, 64), (30, 8), (30, 64), (100, 8), (100, 64), (500, 8))


def rates(kind: str, rng: np.random.Generator, problems: int) -> NDArray[np.float64]:
    """Of problems that are drawn, (problems,)."""
    if kind in BETAS:
        return rng.beta(*BETAS[kind], size=problems)
    share, rate = TWO[kind]
    return np.where(rng.random(problems) < share, rate, 0.0)


def mean_rate(kind: str) -> float:
    """The truth."""
    if kind in TWO:
        share, rate = TWO[kind]
        return share * rate
    a, b = BETAS[kind]
    return a / (a + b)


def coverage(
    kind: str, problems: int, samples: int, repeats: int, method: Literal["auto", "t"], seed: int = 0
) -> tuple[float, float]:
    """Share of intervals that hold the truth, and their mean width."""
    rng, truth, hits, width = np.random.default_rng([seed, problems, samples]), mean_rate(kind), 0, 0.0
    for _ in range(repeats):
        interval = mean_interval(rng.binomial(samples, rates(kind, rng, problems)) / samples, method=method)
        hits += interval.low <= truth + 1e-12 and truth - 1e-12 <= interval.high
        width += interval.high - interval.low
    return hits / repeats, width / repeats


def coverage_of_differences(
    kind: str, problems: int, samples: int, repeats: int, gain: float, seed: int = 0
) -> tuple[float, float]:
    """The same for the difference of two models on the same problems; the second solves `gain` of what is left."""
    rng, hits, width = np.random.default_rng([seed, problems, samples]), 0, 0.0
    truth = gain * (1.0 - mean_rate(kind))
    for _ in range(repeats):
        base = rates(kind, rng, problems)
        # Of the problems, a share is solved for certain now: differences are as unequal between them as rates are.
        other = np.where(rng.random(problems) < gain, 1.0, base)
        interval = difference_interval(rng.binomial(samples, base) / samples, rng.binomial(samples, other) / samples)
        hits += interval.low <= truth + 1e-12 and truth - 1e-12 <= interval.high
        width += interval.high - interval.low
    return hits / repeats, width / repeats


def coverage_of_informative(kind: str, problems: int, samples: int, repeats: int, size: int) -> tuple[float, float]:
    """Of the foretold share of informative groups, and its mean error."""
    rng, hits, error = np.random.default_rng([problems, samples]), 0, 0.0
    drawn = rates(kind, np.random.default_rng(1), 400_000)
    truth = float((1 - drawn**size - (1 - drawn) ** size).mean())
    for _ in range(repeats):
        counts = rng.binomial(samples, rates(kind, rng, problems))
        rewards = [[1.0] * right + [0.0] * (samples - right) for right in counts]
        found = informative_shares(rewards, (size,), draws=300)[size]
        hits += found.low <= truth <= found.high
        error += found.value - truth
    return hits / repeats, error / repeats


def _section(title: str, text: str) -> None:
    say(f"\n## {title}\n\n{text}\n")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    say("| " + " | ".join(header) + " |")
    say("|" + " --- |" * len(header))
    for row in rows:
        say("| " + " | ".join(row) + " |")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    repeats = parser.parse_args().repeats
    _section(
        "Intervals of a mean rate",
        f"Coverage of nominal 95% intervals of a mean rate, {repeats:,} repeats; in brackets the mean width in points\n"
        "(problems x samples):",
    )
    lowest = 1.0
    rows = []
    for kind in [*BETAS, *TWO]:
        found = [coverage(kind, *size, repeats, "auto") for size in SIZES]
        plain = coverage(kind, 30, 64, repeats, "t")
        lowest = min([lowest, *(share for share, _ in found)])
        rows.append((kind, *(f"{share:.1%} ({100 * width:.1f})" for share, width in [*found, plain])))
    _table(("rates", *(f"{p} x {n}" for p, n in SIZES), "plain t, 30 x 64"), rows)
    say(f"\nLowest: {lowest:.1%}.")
    _section("Differences of two models", "Differences of two models on the same problems, 8 samples each:")
    sizes = ((30, 0.0), (30, 0.1), (100, 0.0), (100, 0.1))
    rows = []
    for kind in BETAS:
        found = [coverage_of_differences(kind, problems, 8, repeats, gain) for problems, gain in sizes]
        rows.append((kind, *(f"{share:.1%} ({100 * width:.1f})" for share, width in found)))
    _table(("rates", *(f"{p} problems, {'alike' if not gain else '+10%'}" for p, gain in sizes)), rows)
    few = max(50, repeats // 10)
    _section(
        "Informative groups",
        f"Share of informative groups of 8, foretold from 4 samples of 100 problems, {few:,} repeats:",
    )
    _table(
        ("rates", "coverage", "mean error in points"),
        (
            (kind, f"{share:.1%}", f"{100 * error:+.1f}")
            for kind in BETAS
            for share, error in [coverage_of_informative(kind, 100, 4, few, 8)]
        ),
    )


if __name__ == "__main__":
    main()
